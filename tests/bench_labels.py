"""A twentieth of AN4's training labels is spoilt; how many of those are in the top tenth of the ranking? Into reports/benchmarks/labels.json.

The models that judge learn the spoilt labels in folds by speaker: none has heard the clip that it judges, or its true label. They begin from a model that was trained on synthetic speech alone, which is made first (half an hour on one core) and kept
under VOICELAB_HOME; with --scratch from nothing. (Not from the base model that ships: that one has heard AN4's training speakers with their true labels.)
"""
import argparse, json, os, platform, sys, time
from pathlib import Path

import numpy as np

from voicelab.consistency import out_of_fold
from voicelab.core import git_commit, home, utc_now, write_json
from voicelab.importers import import_corpus
from voicelab.synth import BASE, make_voicesearch
from voicelab.text import encode, min_frames
from voicelab.train import SCRATCH, TrainConfig, train

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "labels.json"
SPEEDS = [.88, .94, 1., 1.06, 1.12]
SYNTHETIC = SCRATCH | dict(epochs=4, dim=160, batch_seconds=40., masks=.4, plain=1, check_every=1, average=2, workers=1, augment=dict(noises=["coloured", "car"], noise=.3, room=.2, phone=.1, silence=.2, speeds=SPEEDS))
SCRATCHED = SCRATCH | dict(epochs=60, masks=.5, splice=.5, average=10, workers=1, augment=SCRATCH["augment"] | dict(speeds=SPEEDS))
JUDGE = SCRATCHED | dict(epochs=30, lr=5e-4, masks=0., plain=0)


KINDS = ("exchanged texts", "exchanged words", "dropped", "inserted", "substituted")

def changed(kind, a, b, rng, words):
    "The texts of two clips, a list of words each, after a mistake of a kind in the first, or in both."
    at = int(rng.integers(len(a)))
    if kind == "exchanged texts": return b, a
    if kind == "exchanged words":
        other = int(rng.integers(len(b)))
        return a[:at] + [b[other]] + a[at + 1:], b[:other] + [a[at]] + b[other + 1:]
    word = str(rng.choice(words))
    return (a[:at] + a[at + 1:] if kind == "dropped" else a[:at] + [word] + a[at:] if kind == "inserted" else a[:at] + [word] + a[at + 1:]), b


def spoil(table, share, seed):
    "A share of the labels made wrong, a fifth in each way; column `spoilt` says how. What cannot be written on its clip, or changes nothing, is drawn again: it would be found without any model."
    rng, texts, how = np.random.default_rng(seed), [t.split() for t in table.text], [""] * len(table)
    words, fits = [w for t in texts for w in t], lambda t, i: t and t != texts[i] and min_frames(encode(" ".join(t))) <= .8 * table.duration[i] * 25
    wanted = round(share * len(table))
    while sum(h != "" for h in how) < wanted:
        kind = KINDS[len([h for h in how if h]) * len(KINDS) // wanted]
        i, j = (int(x) for x in rng.choice([k for k, h in enumerate(how) if not h], 2, replace=False))
        a, b = changed(kind, texts[i], texts[j], rng, words)
        both = kind.startswith("exchanged")
        if not fits(a, i) or both and not fits(b, j): continue
        texts[i], how[i] = a, kind
        if both and wanted > sum(h != "" for h in how): texts[j], how[j] = b, kind
    return table.assign(text=[" ".join(t) for t in texts], spoilt=how)


def begun() -> Path:
    "The folder of a model that knows synthetic queries alone; made where it is missing."
    table = make_voicesearch(home("corpora", "base"), BASE, seed=0)
    train(table[table.split.isin(["train", "dev"])].reset_index(drop=True), run := home("runs", "bench-labels-synthetic"), TrainConfig(**SYNTHETIC), log=False)
    return run


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folds", type=int, default=3)
    p.add_argument("--share", type=float, default=.05)
    p.add_argument("--scratch", action="store_true", help="judges from nothing")
    a = p.parse_args()
    table = import_corpus("an4")
    spoilt = spoil(table[table.split == "train"].reset_index(drop=True), a.share, a.seed)
    init, start = None if a.scratch else begun(), time.time()
    ranked = out_of_fold(spoilt, home("runs", f"bench-labels-{a.seed}-{a.folds}{'-scratch' * a.scratch}-{git_commit()}"), TrainConfig(**SCRATCHED if a.scratch else JUDGE), a.folds, init)
    ranked["top"] = np.arange(len(ranked)) < len(ranked) // 10
    bad = ranked[ranked.spoilt != ""]
    by = bad.groupby("spoilt").top.agg(["sum", "count"])
    result = dict(corrupted=len(bad), found=int(bad.top.sum()), found_in_top_tenth=float(bad.top.mean()), clips=len(ranked), by_kind={k: [int(r["sum"]), int(r["count"])] for k, r in by.iterrows()},
                  minutes=round((time.time() - start) / 60, 1), command=f"python {' '.join(['tests/bench_labels.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    print(json.dumps(result, indent=1))
    print(ranked[(ranked.spoilt == "") & ranked.top][["text", "heard", "errors", "peak", "nats"]].head(15).to_string())
    ranked.drop(columns=["audio_filepath"]).to_csv(home("bench-labels.csv"), index=False)
    write_json(OUT.with_stem(f"labels-{a.seed}") if a.seed else OUT, result)


if __name__ == "__main__": main()
