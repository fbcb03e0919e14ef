"""From scratch on AN4's training speakers alone, within half an hour on two cores. Into reports/benchmarks/an4/seed-N.json.

    python tests/bench_an4.py --seed 0             # trains, then reads the dev speakers: for choosing
    python tests/bench_an4.py --seed 0 --test      # the same, then reads the test set: once, for the claim
    python tests/bench_an4.py --set epochs=20      # another recipe, to try
"""
import argparse, ast, os, platform, sys
from pathlib import Path

import pandas as pd

from voicelab.core import git_commit, home, utc_now, write_json
from voicelab.evaluate import TorchRecognizer, evaluate, summary
from voicelab.importers import import_corpus
from voicelab.model import load_model
from voicelab.train import TrainConfig, train

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "an4"
RECIPE = dict(epochs=70, batch_seconds=40, lr=1e-3, warmup=0.1, average=10, masks=0.5, check_every=5, workers=1, precision="bf16-mixed")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--test", action="store_true")
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    a = p.parse_args()
    change = {k: ast.literal_eval(v) for k, _, v in (s.partition("=") for s in a.set)}
    table = import_corpus("an4")
    cfg = TrainConfig(**{**RECIPE, "seed": a.seed, **change})
    tag = "-".join([git_commit(), str(a.seed), *(s.replace("/", "") for s in a.set)])
    run = home("runs", f"bench-an4-{tag}")
    metrics = train(table[table.split.isin(["train", "dev"])], run, cfg)
    curve = pd.read_csv(run / "curve.csv")
    good = curve.index[curve.dev_wer < 5]
    result = dict(seed=a.seed, minutes=round(curve.seconds.sum() / 60, 1), minutes_to_5_percent_dev=round(curve.seconds[:good[0] + 1].sum() / 60, 1) if len(good) else None,
                  parameters=metrics["parameters"], clips=metrics["clips"], recipe={**RECIPE, **change})
    for split in ["dev", "test"] if a.test else ["dev"]:
        rows = table[table.split == split].reset_index(drop=True)
        for name, recognizer in (("", TorchRecognizer(run)), ("greedy_", TorchRecognizer(load_model(run)))):
            t = summary(evaluate(rows, recognizer)).iloc[0]
            result[f"{split}_{name}wer"] = dict(wer=t.wer, lo=t.lo, hi=t.hi, errors=int(t.errors), words=int(t.words))
            print(f"{split} {name or 'with the language model '}WER {100 * t.wer:.2f} % ({100 * t.lo:.2f} to {100 * t.hi:.2f}), {int(t.errors)} of {int(t.words)} words", flush=True)
    result |= dict(measured_by=f"python {' '.join(['tests/bench_an4.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    print(result)
    if a.test: write_json(OUT / f"seed-{a.seed}.json", result)


if __name__ == "__main__": main()
