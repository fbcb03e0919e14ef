"""From scratch on AN4's training speakers alone, within half an hour on two cores. Into reports/benchmarks/an4/.

    python tests/bench_an4.py --seed 0             # trains, then reads the dev speakers: for choosing
    python tests/bench_an4.py --seed 0 --test      # the same, then reads the test set: once, for the claim; writes seed-0.json
    python tests/bench_an4.py --seed 0 --small     # the model of a million parameters; with --test and --summary into an4/small/
    python tests/bench_an4.py --set epochs=20      # another recipe, to try
    python tests/bench_an4.py --seed 0 --trained-at COMMIT   # the run that this very command made at another commit, decoded and measured anew
    python tests/bench_an4.py --summary            # mean and range of the seeds, and the bundle of the seed that is best on dev
    python tests/bench_an4.py --ablate [N ...]     # the small model for 25 epochs, and what becomes of it when one thing is changed (all rows, or those of these numbers)
    python tests/bench_an4.py --compare            # all runs on dev, and the kept models: what was changed, errors, size, speed on one core; tried.json and trade-off.png
"""
import argparse, ast, itertools, json, os, platform, shutil, sys, time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from voicelab.audio import read_audio
from voicelab.confidence import calibrate
from voicelab.core import git_commit, home, read_json, setting, utc_now, write_json
from voicelab.decode import decode
from voicelab.evaluate import evaluate, summary, wer
from voicelab.export import export_bundle
from voicelab.importers import import_corpus
from voicelab.lm import save_lm, train_lm
from voicelab.model import load_model
from voicelab.recognizer import Recognizer
from voicelab.synth import _MONTHS, _ORDINALS, entity_lists
from voicelab.text import spoken_number
from voicelab.train import TrainConfig, train

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "an4"
RECIPE = dict(epochs=66, batch_seconds=30, lr=1e-3, warmup=0.05, plain=4, stride=4, phones=.3, splice=.5, splice_from=10, masks=.7, average=10, check_every=4, workers=1, noise_only=0.0,
              augment=dict(noise=.1, room=0.0, phone=0.0, silence=.1, speeds=[.88, .94, 1., 1.06, 1.12]))


SMALL = dict(dim=118, epochs=100, lr=1.5e-3, dropout=.05, masks=.5, teacher="reports/benchmarks/an4/model", teach=.7)   # it learns from the large one, as well as from the texts
SHORT = dict(epochs=25, average=6, teacher="")
ABLATED = [dict(), dict(seed=1), dict(phones=0.), dict(splice=0.), dict(augment=RECIPE["augment"] | dict(speeds=[1.])), dict(masks=0.), dict(masks=1.), dict(plain=0), dict(stride=2), dict(average=1), dict(teacher=SMALL["teacher"]),
           dict(consistency=.2), dict(batch_seconds=60), dict(dropout=.2), dict(augment=RECIPE["augment"] | dict(noise=.5, room=.3)), *(dict(masks=0.) | shape for shape in (dict(dim=64), dict(dim=180), dict(dim=256), dict(layers=2))), dict(stride=3)]


def spoken_english():
    "What anybody knows of spelled names, numbers and dates, for the language model: the names and words of the default corpus, letter by letter, and numbers and dates at random."
    rng, number = np.random.default_rng(0), lambda least, most: spoken_number(str(int(rng.integers(least, most))))
    names = {w for name, entries in entity_lists().items() if "templates" not in name for e in entries for w in e.split() if len(w) > 2 and w.isalpha()}
    dates = [f"{rng.choice(_MONTHS)} {rng.choice(_ORDINALS)} nineteen {number(10, 100)}" for _ in range(500)]
    return [" ".join(w) for w in sorted(names)] + dates + [" ".join(number(0, 100) for _ in range(rng.integers(1, 4))) for _ in range(700)]


def tuned(recognizer, rows):
    "The language model's settings with the fewest errors on dev; the default ones where they are as good."
    clips = [read_audio(f) for f in rows.audio_filepath]
    heard, default, tried = recognizer.log_probs(clips), recognizer.fusion, []
    for weight, bonus in itertools.product((.3, .4, .5, .6), (.3, .6, 1.2)):
        fusion = replace(default, weight=weight, bonus=bonus)
        rate = wer(rows.text, [decode(lp, len(c) / 16000, fusion=fusion)["text"] for lp, c in zip(heard, clips)])
        tried.append((rate, abs(weight - default.weight) + abs(bonus - default.bonus), weight, bonus))
    rate, _, weight, bonus = min(tried)
    return dict(weight=weight, bonus=bonus), {f"{w}, {b}": round(100 * r, 2) for r, _, w, b in tried}


def best_on_dev(seeds): return min(seeds, key=lambda s: (s["dev_int8_wer"]["errors"], s["seed"]))


def out_of(a): return OUT / "small" if a.small else OUT


def run_seed(a, change, named=None, run=None):
    table, commit = import_corpus("an4"), a.trained_at or git_commit()     # now: in half an hour the tree may be another
    cfg = TrainConfig(**{**RECIPE, **(SMALL if a.small else {}), "seed": a.seed, **change})
    run = run or home("runs", f"bench-an4-{a.seed}-{sha256(repr(cfg).encode()).hexdigest()[:8]}-{commit}")
    if a.trained_at and not (run / "metrics.json").is_file(): raise SystemExit(f"{run} holds no finished run")
    metrics = train(table[table.split.isin(["train", "dev"])], run, cfg)
    curve = pd.read_csv(run / "curve.csv")
    good = curve.index[curve.dev_wer < 5]
    bundle = export_bundle(load_model(run), run / "bundle", dict(name="an4-from-scratch"), lm=save_lm(train_lm(spoken_english(), 8, 1, train_lm(table[table.split == "train"].text, 8, 1)), run / "lm-wide.npz"))
    threads, dev = setting("THREADS"), table[table.split == "dev"].reset_index(drop=True)
    lm, tried = tuned(Recognizer(bundle, threads=threads), dev)
    config = read_json(bundle / "config.json")
    config["decoder"]["lm"] |= lm
    write_json(bundle / "config.json", config)
    sure = calibrate(bundle, dev, most=len(dev))
    result = dict(seed=cfg.seed, minutes=round(curve.seconds.sum() / 60, 1), minutes_to_5_percent_dev=round(curve.seconds[:good[0] + 1].sum() / 60, 1) if len(good) else None,
                  parameters=metrics["parameters"], clips=metrics["clips"], recipe={**RECIPE, **(SMALL if a.small else {}), **change}, lm=lm, lm_tried_on_dev=tried, confidence=sure["confidence"])
    for split in ["dev", "test"] if a.test else ["dev"]:
        rows = table[table.split == split].reset_index(drop=True)
        for name, recognizer in (("", Recognizer(bundle, threads=threads)), ("int8_", Recognizer(bundle, "int8", threads)), ("greedy_", Recognizer(bundle, threads=threads, lm="none"))):
            t = summary(evaluate(rows, recognizer)).iloc[0]
            result[f"{split}_{name}wer"] = dict(wer=t.wer, lo=t.lo, hi=t.hi, cer=t.cer, errors=int(t.errors), words=int(t.words))
            print(f"{split} {name or 'with the language model '}WER {100 * t.wer:.2f} % ({100 * t.lo:.2f} to {100 * t.hi:.2f}), {int(t.errors)} of {int(t.words)} words", flush=True)
    result |= dict(measured_by=f"python {' '.join(['tests/' + Path(sys.argv[0]).name, *sys.argv[1:]])}", commit=git_commit(), trained_at=commit, date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    result = json.loads(json.dumps(result, default=float))
    write_json(run / "result.json", {k: v for k, v in result.items() if not k.startswith("test_")} | dict(changed={**(SMALL if a.small else {}), **change} if named is None else named))
    if not a.test: return print(json.dumps(result, indent=1))
    write_json(out_of(a) / f"seed-{a.seed}.json", result)
    kept = home("an4-bundles", f"{'small-' * a.small}{a.seed}")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(bundle, kept)


def summarise(a):
    out = out_of(a)
    seeds = [read_json(p) for p in sorted(out.glob("seed-*.json"))]
    if not seeds: raise SystemExit(f"{out} holds no seed-N.json; run --seed N --test first")
    if len({json.dumps(s["recipe"]) for s in seeds}) > 1: raise SystemExit("the seeds were trained by different recipes")
    for name in ("test_wer", "test_int8_wer", "test_greedy_wer", "dev_wer"):
        w = [100 * s[name]["wer"] for s in seeds]
        print(f"{name}: mean {np.mean(w):.2f} % over {len(w)} seeds ({min(w):.2f} to {max(w):.2f}), errors {[s[name]['errors'] for s in seeds]} of {seeds[0][name]['words']}")
    best = best_on_dev(seeds)["seed"]
    model = out / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(home("an4-bundles", f"{'small-' * a.small}{best}"), model, ignore=shutil.ignore_patterns("model.onnx"))
    print(f"seed {best} is best on dev: {model.relative_to(OUT.parent.parent.parent)}, {sum(p.stat().st_size for p in model.iterdir()) / 1e6:.1f} MB")


def compare():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = import_corpus("an4")
    clips = [read_audio(f) for f in table[table.split == "dev"].audio_filepath]
    found = [(p.parent / "bundle", read_json(p)) for p in home("runs").glob("bench-an4-*/result.json")]
    for out, name in ((OUT, "the recipe (kept)"), (OUT / "small", "the small recipe (kept)")):
        if (out / "model").is_dir(): found.append((out / "model", best_on_dev(map(read_json, out.glob("seed-*.json"))) | dict(changed={name: ""})))
    recognizers, seconds = [Recognizer(bundle, "int8", 1, lm="none") for bundle, _ in found], np.zeros(len(found))
    for r in recognizers: r.transcribe(clips[:4])
    for n in range(3):  # in turns: a slow minute is slow for all
        for i, r in enumerate(recognizers):
            start = time.perf_counter()
            for c in clips: r.transcribe([c])
            seconds[i] += time.perf_counter() - start
    heard = 3 * sum(map(len, clips)) / 16000
    t = pd.DataFrame([dict(changed=", ".join(f"{k} {v}".strip() for k, v in d["changed"].items()) or "the recipe", seed=d["seed"], minutes=d["minutes"], million_parameters=round(d["parameters"] / 1e6, 2), times_real_time=round(heard / s),
                           greedy=d["dev_greedy_wer"]["errors"], wer=d["dev_wer"]["errors"], int8=d["dev_int8_wer"]["errors"], words=d["dev_wer"]["words"], commit=d["commit"]) for (_, d), s in zip(found, seconds)]).sort_values("int8")
    print(t.to_string(index=False))
    write_json(OUT / "tried.json", dict(runs=json.loads(t.to_json(orient="records")), measured_by="python tests/bench_an4.py --compare", commit=git_commit(), date=utc_now()))
    fig, ax = plt.subplots(figsize=(7, 4))
    dots = ax.scatter(t.million_parameters, 100 * t.int8 / t.words, c=t.times_real_time)
    for _, r in t[t.changed.str.contains("kept")].iterrows(): ax.annotate(r.changed, (r.million_parameters, 100 * r.int8 / r.words), (0, -14), textcoords="offset points", ha="right" if r.million_parameters > 2 else "center", fontsize=8)
    ax.set(xscale="log", xlabel="parameters, millions", ylabel="dev WER with the language model, int8, %")
    ax.margins(.1)
    ax.set_xticks(ticks := [.3, .6, 1, 2, 4], [f"{n:g}" for n in ticks])
    ax.minorticks_off()
    fig.colorbar(dots, label="times real time, one core, int8, greedy")
    fig.savefig(OUT / "trade-off.png", dpi=120, bbox_inches="tight")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--test", action="store_true")
    p.add_argument("--small", action="store_true")
    p.add_argument("--trained-at", metavar="COMMIT")
    p.add_argument("--summary", action="store_true")
    p.add_argument("--compare", action="store_true")
    p.add_argument("--ablate", nargs="*", type=int, metavar="N")
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    a = p.parse_args()
    if a.summary: return summarise(a)
    if a.compare: return compare()
    if a.ablate is None: return run_seed(a, {k: ast.literal_eval(v) for k, _, v in (s.partition("=") for s in a.set)})
    a.small = True
    for n in a.ablate or range(len(ABLATED)): run_seed(a, SHORT | ABLATED[n], {"short": "", **ABLATED[n]})


if __name__ == "__main__": main()
