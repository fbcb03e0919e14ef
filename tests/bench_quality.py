"""Quality on unheard people: the default corpus, AN4's test speakers and FSDD's held-out speakers. Into reports/benchmarks/quality.json.

Run once, at the end, by `make bench-quality`: it reads AN4's test set, which no test, chart or choice may read.
"""
import argparse, os, platform, sys
from pathlib import Path

from voicelab.core import git_commit, home, read_json, utc_now, write_json
from voicelab.evaluate import TorchRecognizer, evaluate, summary
from voicelab.importers import import_corpus
from voicelab.manifest import assign_splits
from voicelab.model import base_dir, load_model
from voicelab.synth import BASE, make_voicesearch
from voicelab.train import TrainConfig, train

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "quality.json"
TUNE = dict(epochs=8, batch_seconds=40, lr=3e-4, warmup=0.1, dropout=0.0, average=3, check_every=8, workers=1, precision="bf16-mixed")


def measured(rows, run, **more):
    "With the run's language model, as it is served; `greedy_wer` without."
    rows = rows.reset_index(drop=True)
    t, greedy = (summary(evaluate(rows, TorchRecognizer(r))).iloc[0] for r in (run, load_model(run)))
    out = dict(wer=t.wer, lo=t.lo, hi=t.hi, cer=t.cer, errors=int(t.errors), words=int(t.words), utterances=int(t.n), greedy_wer=greedy.wer, **more)
    print(f"WER {100 * t.wer:.2f} % ({100 * t.lo:.2f} to {100 * t.hi:.2f}), {int(t.errors)} of {int(t.words)} words; greedy {100 * greedy.wer:.2f} %", more, flush=True)
    return out


def tuned(name, table, seed, **change):
    run = home("runs", f"bench-quality-{name}-{git_commit()}-{seed}")
    metrics = train(table, run, TrainConfig(**{**TUNE, "seed": seed, **change}), init="base")
    return run, dict(minutes=round(metrics["seconds"] / 60, 1), clips=metrics["clips"])


def voicesearch(seed):
    "The base model as it ships, on voices and sentences that it never heard."
    table = make_voicesearch(home("corpora", "base"), BASE, seed=0)
    return measured(table[table.split == "test"], base_dir(), uses="the base model as it ships; test voices and sentences of the default corpus; language model of the training texts")


def an4(seed, split):
    "The base model fine-tuned on AN4's training speakers."
    table = import_corpus("an4")
    run, more = tuned("an4", table[table.split == "train"], seed)
    return measured(table[table.split == split], run, split=split, **more, uses="base model (AN4 training speakers and synthetic speech), fine-tuned on AN4's training split; language model of the training texts")


FEW_SPEAKERS = dict(epochs=16, lr=8e-4, masks=0.3, augment=dict(noise=.15, room=0., phone=0., silence=.2, pitch=.4, semitones=[-3, 3], tempo=.3, speeds=[.85, .95, 1., 1.05, 1.15]))  # other voices out of four

def fsdd(seed, held_out=("theo", "yweweler")):
    "The base model fine-tuned on four FSDD speakers, measured on the two others. Chosen by holding out one of the four (nicolas) instead."
    table = import_corpus("fsdd")
    table = assign_splits(table, test=list(held_out))
    run, more = tuned("fsdd", table[table.split == "train"], seed, **FEW_SPEAKERS, check_every=16)
    return measured(table[table.split == "test"], run, held_out=list(held_out), **more, uses="base model, fine-tuned on four speakers; language model of the training texts")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="*", default=["voicesearch", "an4", "fsdd"])
    p.add_argument("--an4-split", default="test", choices=["dev", "test"])
    a = p.parse_args()
    result = read_json(OUT) if OUT.exists() else {}
    for name in a.only:
        print(name, flush=True)
        result[name] = dict(measured_by=f"python {' '.join(['tests/bench_quality.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), seed=a.seed,
                            **(an4(a.seed, a.an4_split) if name == "an4" else globals()[name](a.seed)))
        if not (name == "an4" and a.an4_split == "dev"): write_json(OUT, result | dict(machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
