"""The training step: Lightning against a bare PyTorch loop with the same model and data, waiting for data, what augmentation costs, use of the machine's matrix multiply. Into reports/benchmarks/train.json.

Rounds of one epoch over AN4's training speakers, each from the same weights; compared within a round. Every clock starts when the first step is over: workers that start and a first batch that nobody could
prepare belong to no step. `augment_share`: how much longer an epoch takes with the default policy than with clips as they are; `noise_share`: with the policy against noise; `_a_frame`: the same, had the silence and
the tempo of the policies not made the clips longer. `augment_own`, `noise_own`: what the policy itself takes of one core for an epoch, as a share of the epoch with it; that is what it costs at most, were nothing done beside it.
"""
import argparse, os, platform, sys, tempfile, time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from voicelab.augment import Augment
from voicelab.core import git_commit, setting, utc_now, write_json
from voicelab.errors import remedy
from voicelab.importers import import_corpus
from voicelab.loader import Clips, ClipStore, loader
from voicelab.model import CTCModel, ModelConfig
from voicelab.train import Recipe, TrainConfig, _fit, fastest

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "train.json"
POLICIES = dict(none=None, default=Augment(), noise=Augment(**remedy("noise = loud")))


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
    "The same steps without Lightning, timed from the end of the first one: seconds, seconds of waiting for data, output frames."
    recipe = Recipe(model, cfg).train()
    opt, wait, frames, start = torch.optim.AdamW(recipe.parameters(), cfg.lr, weight_decay=cfg.weight_decay), 0.0, 0, None
    for b in data:
        if start is not None:
            wait += time.perf_counter() - asked
            frames += int(b["x"].shape[0] * b["x"].shape[1] / cfg.stride)
        with torch.autocast("cpu", torch.bfloat16, enabled=fastest(cfg.precision) == "bf16-mixed"): loss = recipe.loss(b)[0]
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), cfg.clip_norm)
        opt.step()
        asked = time.perf_counter()
        if start is None: start = asked
    return asked - start, wait, frames


def own(policy, rows, n):
    "Seconds of one core that a policy takes for an epoch, without reading, features and steps."
    store = ClipStore(rows.audio_filepath)
    clips = [store[i] for i in range(len(rows))]
    start = time.process_time()
    for i, x in enumerate(clips): policy.padded(x, np.random.default_rng((n, i)), clips)
    return time.process_time() - start


class Clocked(Recipe):
    "Notes when each step is over."
    ends = []
    def on_train_batch_end(self, *args): Clocked.ends.append(time.perf_counter())


def lightning(model, cfg, data, rows):
    "Seconds of Lightning's steps, from the end of the first one."
    Clocked.ends = []
    with tempfile.TemporaryDirectory() as tmp, mock.patch("voicelab.train.Recipe", Clocked):
        (Path(tmp) / "checkpoints").mkdir()
        _fit(model, cfg, Path(tmp), data, None, rows, rows.head(0), False)
    return Clocked.ends[-1] - Clocked.ends[0]


def measured(n, rows, cfg, ops):
    "One round: a row of the table. Every second round the other way round, for the machine may tire."
    def fresh(policy):
        torch.manual_seed(n)
        return CTCModel(ModelConfig(stride=4)), cfg, loader(Clips(rows, policy, cfg.masks, cfg.noise_only, n, 4), cfg.batch_seconds, workers=1)
    def worked():
        model, *rest = fresh(POLICIES["default"])
        return model, *bare(model, *rest)
    runs = dict(lightning=lambda: lightning(*fresh(POLICIES["default"]), rows), default=worked, **{k: lambda p=p: bare(*fresh(p)) for k, p in POLICIES.items() if k != "default"})
    got = {k: runs[k]() for k in (list(runs) if n % 2 else list(runs)[::-1])}
    model, seconds, wait, frames = got["default"]
    plain, _, plain_frames = got["none"]
    noisy, _, noisy_frames = got["noise"]
    return dict(round=n, lightning_s=round(got["lightning"], 2), bare_s=round(seconds, 2), plain_s=round(plain, 2), noise_s=round(noisy, 2), overhead=round(got["lightning"] / seconds - 1, 4), waiting=round(wait / seconds, 4),
                augment_share=round(seconds / plain - 1, 4), augment_share_a_frame=round(seconds / plain * plain_frames / frames - 1, 4), noise_share=round(noisy / plain - 1, 4), noise_share_a_frame=round(noisy / plain * plain_frames / noisy_frames - 1, 4),
                augment_own=round(own(POLICIES["default"], rows, n) / seconds, 4), noise_own=round(own(POLICIES["noise"], rows, n) / noisy, 4),
                utilisation=round(work(model, frames) / seconds / ops, 4))


KEYS = "overhead waiting augment_share augment_share_a_frame augment_own noise_share noise_share_a_frame noise_own utilisation".split()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--clips", type=int, help="so many only, to see whether all of it runs")
    a = p.parse_args()
    torch.set_num_threads(setting("THREADS"))
    rows = import_corpus("an4").query("split == 'train'").head(a.clips or 10**9).reset_index(drop=True)
    cfg = TrainConfig(epochs=1, batch_seconds=40, stride=4, average=1, check_every=1, workers=1)
    table, ops = [], peak(torch.bfloat16 if fastest(cfg.precision) == "bf16-mixed" else torch.float32)
    for n in range(a.rounds + 1):
        row = measured(n, rows, cfg, ops)
        print(row, flush=True)
        if n: table.append(row)                                        # the first round warms up
    median = {k: float(np.median([r[k] for r in table])) for k in KEYS}
    print(median)
    if a.clips: return
    write_json(OUT, dict(median, rounds=table, peak_gflops=round(ops / 1e9), precision=fastest(cfg.precision), commit=git_commit(), date=utc_now(),
                         measured_by=f"python {' '.join(['tests/bench_train.py', *sys.argv[1:]])}", machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
