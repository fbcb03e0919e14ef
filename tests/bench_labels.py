"""A twentieth of AN4's training labels is spoilt; how many of those are in the top tenth of the ranking? Into reports/benchmarks/labels.json.

The models that judge are trained from scratch on the spoilt labels, in folds by speaker: none has heard the clip that it judges, or its true label.
"""
import argparse, json, os, platform, time
from pathlib import Path

import numpy as np

from voicelab.consistency import out_of_fold
from voicelab.core import git_commit, home, utc_now, write_json
from voicelab.importers import import_corpus
from voicelab.text import encode, min_frames
from voicelab.train import TrainConfig

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "labels.json"
CONFIG = dict(epochs=30, batch_seconds=20, lr=1e-3, warmup=.05, plain=4, stride=4, average=5, masks=.5, check_every=100, workers=1, noise_only=0., augment=dict(noise=.1, room=0., phone=0., silence=.1))


def spoil(table, share, seed):
    "Labels of a share of the rows exchanged between clips, or with a word dropped, inserted or substituted, a quarter each; column `spoilt` says how."
    rng, texts, how = np.random.default_rng(seed), table.text.tolist(), [""] * len(table)
    words = [w for t in texts for w in t.split()]
    rows = rng.permutation(len(table))[:2 * round(share * len(table) / 2)].tolist()
    kinds = [("swapped", "dropped", "inserted", "substituted")[4 * i // len(rows)] for i in range(len(rows))]
    if kinds.count("swapped") % 2: kinds[kinds.count("swapped") - 1] = "dropped"
    swapped = [i for i, k in zip(rows, kinds) if k == "swapped"]
    for i, k in zip(rows, kinds):
        said = table.text[i].split()
        at, other = int(rng.integers(len(said))), said
        if k == "dropped" and len(said) > 1: other = said[:at] + said[at + 1:]
        elif k == "inserted": other = said[:at] + [str(rng.choice(words))] + said[at:]
        elif k != "swapped": other = said[:at] + [str(rng.choice([w for w in words if w != said[at]]))] + said[at + 1:]; k = "substituted"
        texts[i], how[i] = " ".join(other), k
    for a, b in zip(swapped[::2], swapped[1::2]): texts[a], texts[b] = table.text[b], table.text[a]
    for i in rows:                                                              # a label that cannot be written on its clip would stop the training with a reason: no test of the ranking
        if min_frames(encode(texts[i])) > .8 * table.duration[i] * 25 or texts[i] == table.text[i]: texts[i], how[i] = table.text[i], ""
    return table.assign(text=texts, spoilt=how)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folds", type=int, default=3)
    p.add_argument("--share", type=float, default=.05)
    a = p.parse_args()
    table = import_corpus("an4")
    spoilt = spoil(table[table.split == "train"].reset_index(drop=True), a.share, a.seed)
    start = time.time()
    ranked = out_of_fold(spoilt, home("runs", f"bench-labels-{a.seed}-{a.folds}-{git_commit()}"), TrainConfig(**CONFIG), a.folds)
    ranked["top"] = np.arange(len(ranked)) < len(ranked) // 10
    bad = ranked[ranked.spoilt != ""]
    by = bad.groupby("spoilt").top.agg(["sum", "count"])
    result = dict(found=int(bad.top.sum()), spoilt=len(bad), clips=len(ranked), recall=float(bad.top.mean()), by_kind={k: [int(r["sum"]), int(r["count"])] for k, r in by.iterrows()},
                  minutes=round((time.time() - start) / 60, 1), measured_by=f"python tests/bench_labels.py --seed {a.seed} --folds {a.folds}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    print(json.dumps(result, indent=1))
    print(ranked[(ranked.spoilt == "") & ranked.top][["text", "heard", "errors", "peak", "nats"]].head(15).to_string())
    ranked.drop(columns=["audio_filepath"]).to_csv(home("bench-labels.csv"), index=False)
    write_json(OUT, result)


if __name__ == "__main__": main()
