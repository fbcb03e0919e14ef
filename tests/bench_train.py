"""The training step: Lightning against a bare PyTorch loop with the same model and data, waiting for data, use of the machine's matrix multiply. Into reports/benchmarks/train.json.

Rounds of one epoch over AN4's training speakers, Lightning and bare loop in turn, each from the same weights; compared within a round.
"""
import argparse, os, platform, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch

from voicelab.augment import Augment
from voicelab.core import git_commit, setting, utc_now, write_json
from voicelab.importers import import_corpus
from voicelab.loader import Clips, loader
from voicelab.model import CTCModel, ModelConfig
from voicelab.train import Recipe, TrainConfig, _fit, fastest

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "train.json"


def work(model, frames):
    "Multiplications and additions of one training step on so many output frames of LSTM and linear layers: forward, and twice that backward."
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    convs = sum(c.weight.numel() * s for c, s in zip(model.convs, (4 * 40 / 2, 20)))      # positions of a kernel in an output frame, by mel band (stride 4: the first one computes two)
    return 6 * (weights + convs) * frames


def peak(dtype, n=1024, repeats=20):
    "Operations a second of a square matrix product."
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    for _ in range(3): a @ b
    start = time.perf_counter()
    for _ in range(repeats): a @ b
    return 2 * n**3 * repeats / (time.perf_counter() - start)


def bare(model, cfg, data):
    "The same steps without Lightning: seconds, seconds of waiting for data, output frames."
    recipe = Recipe(model, cfg).train()
    opt, wait, frames = torch.optim.AdamW(recipe.parameters(), cfg.lr, weight_decay=cfg.weight_decay), 0.0, 0
    start = asked = time.perf_counter()
    for b in data:
        wait += time.perf_counter() - asked
        with torch.autocast("cpu", torch.bfloat16, enabled=fastest(cfg.precision) == "bf16-mixed"): loss = recipe.loss(b)[0]
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), cfg.clip_norm)
        opt.step()
        frames += int(b["x"].shape[0] * b["x"].shape[1] / cfg.stride)
        asked = time.perf_counter()
    return time.perf_counter() - start, wait, frames


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=4)
    a = p.parse_args()
    torch.set_num_threads(setting("THREADS"))
    rows = import_corpus("an4").query("split == 'train'").reset_index(drop=True)
    cfg = TrainConfig(epochs=1, batch_seconds=40, stride=4, average=1, check_every=1, workers=1, augment=dict(room=0., phone=0.))
    table, ops = [], peak(torch.bfloat16 if fastest(cfg.precision) == "bf16-mixed" else torch.float32)
    for n in range(a.rounds + 1):
        def fresh():
            torch.manual_seed(n)
            return CTCModel(ModelConfig(stride=4)), loader(Clips(rows, Augment(**cfg.augment), cfg.masks, cfg.noise_only, n, 4), cfg.batch_seconds, workers=1)
        def lightning():
            with tempfile.TemporaryDirectory() as tmp:
                (Path(tmp) / "checkpoints").mkdir()
                model, data = fresh()
                return _fit(model, cfg, Path(tmp), data, rows.head(0), False)[1].curve[0]["seconds"]
        def loop():
            model, data = fresh()
            return model, *bare(model, cfg, data)
        got = {f.__name__: f() for f in ((lightning, loop) if n % 2 else (loop, lightning))}
        model, seconds, wait, frames = got["loop"]
        row = dict(round=n, lightning_s=got["lightning"], bare_s=round(seconds, 2), overhead=round(got["lightning"] / seconds - 1, 4), waiting=round(wait / seconds, 4), utilisation=round(work(model, frames) / seconds / ops, 4))
        print(row, flush=True)
        if n: table.append(row)                                        # the first round warms up
    median = {k: float(np.median([r[k] for r in table])) for k in ("overhead", "waiting", "utilisation")}
    print(median)
    write_json(OUT, dict(median=median, rounds=table, peak_gflops=round(ops / 1e9), precision=fastest(cfg.precision), commit=git_commit(), date=utc_now(),
                         measured_by=f"python {' '.join(['tests/bench_train.py', *sys.argv[1:]])}", machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
