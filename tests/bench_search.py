"""Voice search from end to end: is the right page among the first five, and how soon? Into reports/benchmarks/search.json.

    python tests/bench_search.py [--queries 400] [--model BUNDLE] [--page 12]

Two worlds. The default corpus: queries of its test voices, which no training heard, over the built-in documents; the right pages are those of the things that the query names (its city, song, street …), as
the grammar that wrote it knows; queries that name nothing with a page are left out. And AN4's dev speakers, people, who spell names and streets: a directory has one page for each word that anybody in AN4 spells,
the right one is that word. Results come from the served application over HTTP: time is from the end of the upload to the answer. Beside them what the true text would have found, and the best reading alone.
With --page, instead, what a person waits for: so many of the queries are spoken into the page in a real Chromium; time is from the last sound of the voice to the results on the screen. It is printed, not stored.
"""
import argparse, json, os, platform, sys, tempfile, time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd

from voicelab.audio import read_audio, write_wav
from voicelab.core import git_commit, home, package_path, utc_now, write_json, write_jsonl
from voicelab.evaluate import counts
from voicelab.export import export_bundle
from voicelab.importers import import_corpus
from voicelab.model import load_model
from voicelab.registry import Registry
from voicelab.search import SearchIndex
from voicelab.server import server
from voicelab.synth import _PAGES, documents, make_voicesearch, plan

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "search.json"


def asked(n):
    "Queries of the default corpus and the ids of their right pages."
    sizes, titles = dict(test=n), {d["title"].lower(): d["id"] for d in documents()}
    rows, slots = make_voicesearch(home("corpora", f"bench-search-{n}"), sizes), plan(sizes, 0)
    assert (rows.text == slots.text).all()
    def right(kind, named):
        things = [(name, e) for name, v in named.items() if _PAGES.get(name, ("",))[0] == kind for e in (v if isinstance(v, list) else [v])]
        return {i for name, e in things for t, i in titles.items() if t == _PAGES[name][1].format(e, brand="").lower() or name == "products" and t.startswith("buy ") and t.endswith(f" {e}")}
    rows = rows.assign(right=[right(k, s) for k, s in zip(slots.kind, slots.slots)])
    return rows[rows.right.str.len() > 0].reset_index(drop=True), documents()


def spelled():
    "AN4's dev speakers' spelled words and the directory of all words that are spelled in AN4's training and dev texts."
    t = import_corpus("an4")
    t = t[t.split.isin(["train", "dev"]) & t.text.str.fullmatch("[a-z]( [a-z]){2,}")]
    words = sorted({x.replace(" ", "") for x in t.text})
    docs = [dict(id=f"a{i}", title=w.capitalize(), url=f"/directory/{w}", text=f"{w.capitalize()}, spelled {' '.join(w)}.") for i, w in enumerate(words)]
    rows = t[t.split == "dev"].reset_index(drop=True)
    return rows.assign(right=[{f"a{words.index(x.replace(' ', ''))}"} for x in rows.text]), docs


def measure(rows, docs, bundle, k=5):
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write_jsonl(tmp / "docs.jsonl", docs)
        registry, index = Registry(tmp / "registry"), SearchIndex(docs)
        registry.promote("voicesearch", registry.register("voicesearch", bundle), "bench", "bench")
        said, ms = [], []
        with server(env=dict(VOICELAB_HOME=str(tmp), VOICELAB_SEARCH_DOCS=str(tmp / "docs.jsonl"), VOICELAB_LOG_LEVEL="off")) as url, httpx.Client(base_url=url, timeout=60) as c:
            def ask(f): return c.post("/v1/search", files=dict(file=Path(f).read_bytes()), data=dict(k=k)).raise_for_status().json()
            ask(rows.audio_filepath[0])
            for f in rows.audio_filepath:
                start = time.perf_counter()
                said.append(ask(f))
                ms.append(1000 * (time.perf_counter() - start))
    def found(results): return np.array([bool(want & {r["id"] for r in got}) for want, got in zip(rows.right, results)])
    true, one, speech = found([index.search(t, k) for t in rows.text]), found([index.search(a["text"], k) if a["text"] else [] for a in said]), found([a["results"] for a in said])
    first = np.array([bool(a["results"]) and a["results"][0]["id"] in want for want, a in zip(rows.right, said)])
    c = pd.DataFrame([counts(t, a["text"]) for t, a in zip(rows.text, said)])
    wrong = c.errors.to_numpy() > 0
    return dict(queries=len(rows), speakers=int(rows.speaker.nunique()), pages=len(docs), wer=round(100 * c.errors.sum() / c.words.sum(), 2), sentences_right=round(float(1 - wrong.mean()), 4),
                recall5_true_text=round(float(true.mean()), 4), recall5_speech=round(float(speech.mean()), 4), recall5_best_reading=round(float(one.mean()), 4), first_is_right=round(float(first.mean()), 4),
                misheard=int(wrong.sum()), recall5_misheard=round(float(speech[wrong].mean()), 4) if wrong.any() else None, ms={f"p{q}": round(float(np.percentile(ms, q)), 1) for q in (50, 95)})


_WATCH = """
  window.seen = { first: 0, last: 0, quiet: 0, released: 0, shown: 0 };
  const Node = AudioWorkletNode, now = () => performance.now();
  window.AudioWorkletNode = class extends Node {
    constructor(...all) {
      super(...all);
      this.port.addEventListener("message", ({ data }) => {
        const loudest = data.findLastIndex((s) => Math.abs(s) > THRESHOLD), ms = 1000 / this.context.sampleRate;
        if (loudest >= 0) Object.assign(seen, { first: seen.first || now(), last: now() - (data.length - 1 - loudest) * ms, quiet: 0 });
        else if (seen.last) seen.quiet += data.length * ms;
      });
    }
  };
  addEventListener("keyup", () => seen.released = now(), true);
  addEventListener("DOMContentLoaded", () => new MutationObserver(() => requestAnimationFrame(() => requestAnimationFrame(() => seen.shown = now()))).observe(document.getElementById("transcript"), { childList: true }));
"""   # when the last sound came (and how long ago that was), when the key was let go, and when results had been painted


def spoken(browser, url, handsfree, ms):
    "Speak the microphone's clip, so long, into the page; what `_WATCH` saw, in milliseconds. A key is let go a fifth of a second after the voice."
    page = browser.new_page(bypass_csp=True)                # playwright waits by an eval in the page
    page.add_init_script(_WATCH.replace("THRESHOLD", "0.01"))
    page.goto(url)
    page.check("#handsfree") if handsfree else page.keyboard.down("Space")
    if not handsfree:
        page.wait_for_function(f"seen.quiet >= 200 && seen.last - seen.first > {.9 * ms - 100}", polling=10)
        page.keyboard.up("Space")
    page.wait_for_function("seen.shown > 0", timeout=60_000)
    seen = page.evaluate("seen")
    page.close()
    return seen


def on_the_page(rows, docs, bundle):
    "Median and 95th percentile of the time from the last sound, and from the release of the key, to results on the screen."
    from conftest import chromium, state_with
    from playwright.sync_api import sync_playwright
    ms = {"hands-free, from the last sound": [], "push to talk, from the last sound": [], "push to talk, from the release": []}
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        write_jsonl(Path(tmp, "docs.jsonl"), docs)
        with server(env=dict(VOICELAB_HOME=str(state_with(bundle, Path(tmp))), VOICELAB_SEARCH_DOCS=f"{tmp}/docs.jsonl", VOICELAB_LOG_LEVEL="off")) as url:
            for f in rows.audio_filepath:
                x = read_audio(f)
                loud = np.flatnonzero(np.abs(x) > .01)
                clip = np.r_[np.zeros(8000), x[:loud[-1] + 1], np.zeros(16000 * 8)].astype(np.float32)
                browser = chromium(p, write_wav(Path(tmp, "clip.wav"), clip))
                free, push = (spoken(browser, url, handsfree, np.ptp(loud) / 16) for handsfree in (True, False))
                browser.close()
                for name, seen, since in zip(ms, (free, push, push), ("last", "last", "released")): ms[name].append(seen["shown"] - seen[since])
    return dict(clips=len(rows), ms={name: {f"p{q}": round(float(np.percentile(v, q))) for q in (50, 95)} for name, v in ms.items()})


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--queries", type=int, default=400)
    p.add_argument("--model", help="a bundle; by default the base model as it ships")
    p.add_argument("--page", type=int, default=0, help="measure only the wait on the page, over so many queries")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        bundle = a.model or export_bundle(load_model(package_path("base")), Path(tmp) / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz")
        if a.page:
            rows, docs = asked(max(40, 2 * a.page))
            return print(json.dumps(on_the_page(rows.head(a.page), docs, bundle), indent=1))
        out = dict(voicesearch=measure(*asked(a.queries), bundle), an4_spelled=measure(*spelled(), bundle))
    out |= {new: {w: out[w][old] for w in ("voicesearch", "an4_spelled")} for new, old in (("recall5_text", "recall5_true_text"), ("recall5_speech", "recall5_speech"), ("sentence_accuracy", "sentences_right"))}
    out["end_to_results_p95_ms"] = {w: out[w]["ms"]["p95"] for w in ("voicesearch", "an4_spelled")}
    print(json.dumps(out, indent=1))
    write_json(OUT, dict(out, model=a.model or "base", measured_by=f"python {' '.join(['tests/bench_search.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
