"""Does the slice analysis keep silent where there is nothing, and find what is there? Into reports/benchmarks/slices.json.

    python tests/bench_slices.py [--resamplings 400]

Errors of real clips, transcribed once by the base model: AN4's dev speakers, and voices of the default corpus that no training heard. *Silence*: the tags and measured properties of whole speakers are dealt out
to other speakers, so that no tag has anything to do with any error, while errors still cluster by speaker and tags still go together; anything that is reported then, single slice or pair, is a false alarm.
*Planted*: some of the dealt tags' clips get more errors, as a bad slice would; it counts when that slice is called worse.
"""
import argparse, os, platform, sys
from pathlib import Path

import numpy as np
import pandas as pd

from voicelab import errors
from voicelab.core import git_commit, package_path, progress, read_json, utc_now, write_json
from voicelab.corpus import prepare
from voicelab.errors import MEASURED, slices, with_measured
from voicelab.evaluate import TorchRecognizer, evaluate

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "slices.json"
TAGS = ["gender", "slice", "kind", "accent", "age", "device", "noise", "region", "duration", "length", *MEASURED]
SPLITS = dict(an4="dev", voicesearch="test")


def heard(corpus):
    "The clips that judge a corpus, with errors of the base model, tags and measured properties."
    df = prepare(corpus, "quick")
    t = with_measured(evaluate(df[df.split == SPLITS[corpus]].reset_index(drop=True), TorchRecognizer(package_path("base"))))
    t["length"] = t.words.astype(float)                                        # `words` itself counts; it cannot be dealt out
    return t[["speaker", "errors", "words", *(c for c in TAGS if c in t)]]


def dealt(table, rng):
    "The table with the tags of whole speakers dealt to other speakers; errors, words and speakers stay."
    tags, rows = [c for c in TAGS if c in table], table.groupby("speaker").indices
    names = list(rows)
    giver = dict(zip(names, rng.permutation(names)))
    order = np.empty(len(table), int)
    for s, own in rows.items():
        theirs = rng.permutation(rows[giver[s]])
        order[own] = np.resize(theirs, len(own))
    return table.assign(**{c: table[c].to_numpy()[order] for c in tags})


def planted(table, rng, share, times):
    "The dealt table with a tag `planted` on about this share of the clips, which has that many times the errors; and the rate that came of it."
    t = dealt(table, rng)
    inside = rng.random(len(t)) < share
    rate = t.errors.sum() / t.words.sum()
    more = rng.binomial(t.words, min(1, (times - 1) * rate)) * inside
    return t.assign(errors=np.minimum(t.errors + more, t.words), planted=np.where(inside, "yes", "no"))


def silence(table, n, seed):
    fired, singles, pairs = [], [], []
    for i in progress(range(n), "silence", total=n):
        if i % 50 == 0: print(i, int(np.sum(fired)), flush=True)
        s = slices(dealt(table, np.random.default_rng((seed, i))))
        real = s[s.finding.isin(["worse", "better"])]
        two = real.tag.str.contains(" & ").any()
        fired.append(len(real) > 0); pairs.append(bool(two)); singles.append(bool((~real.tag.str.contains(" & ")).any()))
    k = int(np.sum(fired))
    return dict(resamplings=n, fired=k, share=k / n, singles=float(np.mean(singles)), pairs=float(np.mean(pairs)), slices_looked_at=int((s.finding != "too few").sum()))


def found(table, n, seed, share, times):
    hits = [bool((slices(planted(table, np.random.default_rng((seed, i, 1)), share, times)).query("tag == 'planted' and value == 'yes'").finding == "worse").any()) for i in progress(range(n), f"planted x{times}", total=n)]
    return dict(share_of_clips=share, times_the_rate=times, trials=n, found=float(np.mean(hits)))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--resamplings", type=int, default=400)
    p.add_argument("--trials", type=int, default=60)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="*", default=list(SPLITS))
    a = p.parse_args()
    errors.bootstrap = lambda *a, **k: (np.nan, np.nan)                          # the intervals that are shown beside a slice have no part in what is reported, and take most of the time
    for corpus in a.only:
        t = heard(corpus)
        out = dict(clips=len(t), speakers=int(t.speaker.nunique()), words=int(t.words.sum()), wer=float(t.errors.sum() / t.words.sum()), tags=[c for c in TAGS if c in t],
                           silence=silence(t, a.resamplings, a.seed), planted=[found(t, a.trials, a.seed, share, times) for share in (.2,) for times in (2, 3, 5)])
        out |= dict(measured_by=f"python {' '.join(['tests/bench_slices.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
        print(corpus, out, flush=True)
        write_json(OUT, (read_json(OUT) if OUT.exists() else {}) | {corpus: out})


if __name__ == "__main__": main()
