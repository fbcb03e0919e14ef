"""What more data would bring: the learning curve of AN4's training speakers, and whether half of the data foretells all of it. Into reports/benchmarks/curve.json.

    python tests/bench_curve.py [--seeds 3]

A model of a million parameters is trained from scratch (the base model has heard these speakers) on growing parts, whole speakers each, in an order of speakers of its own for every seed, and read on AN4's dev speakers. The law is fitted to the sizes up to half, and its forecast of the whole stands beside what was measured there;
then to all sizes, which says what more hours of this kind would bring.
"""
import argparse, json, os, platform, sys
from pathlib import Path

from voicelab.core import git_commit, home, utc_now, write_json
from voicelab.curve import forecast, grow, held_back, in_words
from voicelab.importers import import_corpus
from voicelab.train import SCRATCH, TrainConfig

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "curve.json"
SHARES = (.125, .25, .5, 1.)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--target", type=float, default=.05, help="rate to say the hours for")
    a = p.parse_args()
    table, rows = import_corpus("an4").query("split != 'test'").reset_index(drop=True), []
    for seed in range(a.seeds):
        measured = grow(table, home("runs", f"bench-curve-{seed}-{git_commit()}"), TrainConfig(**SCRATCH, workers=1, seed=seed), SHARES, None, seed)
        found = forecast(measured)
        rows.append(dict(seed=seed, points=found.points.round(4).to_dict("records"), held_back=held_back(measured), forecast=in_words(found, a.target)))
        print(json.dumps(rows[-1], indent=1), flush=True)
    checked = [r["held_back"] for r in rows]
    write_json(OUT, dict(seeds=rows, inside=sum(c["inside"] for c in checked), of=len(checked), target=a.target, command=f"python {' '.join(['tests/bench_curve.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
