"""Other blocks in place of the LSTMs, other units in place of letters: the small recipe of `bench_an4.py --ablate` with one of them, a million parameters each, on AN4's dev speakers. Into reports/benchmarks/an4/blocks.json.

    python tests/bench_blocks.py lstm         # as it is, for comparison
    python tests/bench_blocks.py conv         # convolutions over 0.6 s, gated, with feed-forward layers on both sides
    python tests/bench_blocks.py conformer    # the same with self-attention among them (Gulati et al., Conformer, 2020)
    python tests/bench_blocks.py told         # each LSTM layer is told what the one before would write, and is trained to write it (Nozaki and Komatsu, Self-conditioned CTC, 2021)
    python tests/bench_blocks.py slow         # the middle LSTM layer takes steps of twice the length, as the middle of squeezeformers and zipformers does (Kim et al., 2022; Yao et al., 2023)
    python tests/bench_blocks.py tracts       # vocal tracts of other lengths: frequencies moved by up to a tenth, the tempo left alone (Jaitly and Hinton, VTLP, 2013)
    python tests/bench_blocks.py bpe 40       # letters, and 40 units made of the neighbours that are most frequent in the training texts (Sennrich et al., 2016)
    python tests/bench_blocks.py conformer --set lr=1e-3 dim=96
"""
import argparse, ast
from collections import Counter
from hashlib import sha256
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from voicelab.core import home, read_json, write_json


def merge(ids, a, b, new):
    out = []
    for i in ids:
        if out and (out[-1], i) == (a, b): out[-1] = new
        else: out.append(i)
    return out


def use_bpe(n):
    "From here on a text is written with n more units. To be called before anything else learns the units."
    from voicelab import text
    from voicelab.importers import import_corpus
    letters, an4, merges = text.encode, import_corpus("an4"), []
    words = [list(ids) for ids in (letters(w) for t in an4[an4.split == "train"].text for w in t.split())]
    for _ in range(n):
        (a, b), _ = Counter(p for w in words for p in pairwise(w)).most_common(1)[0]
        merges.append((a, b, len(text.TOKENS)))
        text.TOKENS.append(text.TOKENS[a] + text.TOKENS[b])
        words = [merge(w, *merges[-1]) for w in words]
    def encode(said):
        out = []
        for ids in map(letters, said.split()):
            for m in merges: ids = merge(ids, *m)
            out += ids
        return out
    text.encode = encode


class Block(nn.Module):
    "Half a feed-forward layer, self-attention (or none), a gated convolution, half a feed-forward layer."
    def __init__(self, d, attend, kernel=15, heads=4):
        super().__init__()
        def feed(): return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        self.before, self.after, self.heads = feed(), feed(), heads
        self.qkv, self.mix = (nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d)), nn.Linear(d, d)) if attend else (None, None)
        self.gate, self.wide, self.calm, self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d)), nn.Conv1d(d, d, kernel, padding=kernel // 2, groups=d), nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x, flip):  # (N, S, d), and `flip_index`, whose first column is the last step of each clip
        there = torch.arange(x.shape[1], device=x.device)[None] <= flip[:, :1]
        x = x + .5 * self.before(x)
        if self.mix:
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)      # (N, heads, S, d / heads) each
            share = (q @ k.transpose(2, 3) / q.shape[3] ** .5).masked_fill(~there[:, None, None], -1e4).softmax(3)
            x = x + self.mix((share @ v).transpose(1, 2).flatten(2))
        y = F.glu(self.gate(x), 2) * there[:, :, None]
        x = x + self.out(F.silu(self.calm(self.wide(y.transpose(1, 2)).transpose(1, 2))))
        return x + .5 * self.after(x)


def use_blocks(attend):
    "From here on our own models are made of such blocks; `layers` says how many, `dim` how wide."
    from voicelab import model
    class Blocks(model.CTCModel):
        def __init__(self, cfg=None):
            super().__init__(cfg)
            self.layers = nn.ModuleList(Block(self.cfg.dim, attend) for _ in range(self.cfg.layers))
            self.norms = nn.ModuleList(nn.LayerNorm(self.cfg.dim) for _ in range(self.cfg.layers))
            self.head = nn.Linear(self.cfg.dim, self.cfg.vocab)
    model.CTCModel = Blocks


def use_told(share=.3):
    "From here on our own models hear of what their lower layers would write; so much of the loss is theirs."
    from voicelab import model, train
    class Told(model.CTCModel):
        def __init__(self, cfg=None):
            super().__init__(cfg)
            self.tell = nn.Linear(self.cfg.vocab, 2 * self.cfg.dim)
            self.between = []
            for norm in self.norms[:-1]: norm.register_forward_hook(self.heard)
        def heard(self, norm, given, x):
            lp = self.head(x).float().log_softmax(2)
            self.between.append(lp)
            return x + self.tell(lp.exp())
        def forward(self, x, x_lens):
            self.between = []
            return super().forward(x, x_lens)
    own = train.Recipe.loss
    def loss(self, b):
        out, lp, lens = own(self, b)
        if not self.training: return out, lp, lens
        each = [F.ctc_loss(train.only_blank(m, lens, b["silent"]).transpose(0, 1), b["y"], lens, b["y_lens"], zero_infinity=True, reduction="none") for m in self.model.between]
        return (1 - share) * out + share * sum((e / b["y_lens"].clamp(min=1)).mean() for e in each) / len(each), lp, lens
    model.CTCModel, train.Recipe.loss = Told, loss


def use_slow():
    "From here on the second layer of our own models takes steps of twice the length."
    from voicelab import model
    class Slow(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
        def forward(self, x, flip):
            half = x[:, ::2]                                             # the layer below has seen what lies between
            y = self.layer(half, model.flip_index((flip[:, 0] + 2) // 2, half.shape[1]))
            return x + y.repeat_interleave(2, 1)[:, :x.shape[1]]
    class Uneven(model.CTCModel):
        def __init__(self, cfg=None):
            super().__init__(cfg)
            self.layers[1] = Slow(self.layers[1])
    model.CTCModel = Uneven


def use_tracts(most=.1, bend=4800.):
    "From here on clips of a training are heard from vocal tracts of other lengths; above the bend frequencies go back to where they were."
    from voicelab import loader
    from voicelab.features import FEATURES
    low, high = (1127 * np.log(1 + f / 700) for f in (FEATURES.low_hz, FEATURES.sample_rate / 2 + FEATURES.high_hz))
    mels = np.linspace(low, high, FEATURES.n_mels + 2)[1:-1]
    hz, top = 700 * (np.exp(mels / 1127) - 1), FEATURES.sample_rate / 2
    own = loader.Clips.__getitem__
    def item(self, which):
        feats, *more = own(self, which)
        if self.augment is None or which[0] < self.plain: return feats, *more
        k = np.random.default_rng((self.seed, *which, 7)).uniform(1 - most, 1 + most)
        there = np.interp(hz, [0, bend, top], [0, k * bend, top])
        where = np.interp(1127 * np.log(1 + there / 700), mels, np.arange(len(mels)))
        left = np.minimum(where.astype(int), len(mels) - 2)
        part = (where - left).astype(np.float32)
        return feats[:, left] * (1 - part) + feats[:, left + 1] * part, *more
    loader.Clips.__getitem__ = item


SHAPES = dict(tracts={}, told={}, slow={}, lstm={}, conv=dict(dim=112, layers=7), conformer=dict(dim=112, layers=5), bpe={})


def main():
    p = argparse.ArgumentParser()
    p.add_argument("kind", choices=SHAPES)
    p.add_argument("units", type=int, nargs="?", default=40)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    a = p.parse_args()
    if a.kind == "bpe": use_bpe(a.units)
    if a.kind in ("conv", "conformer"): use_blocks(a.kind == "conformer")
    if a.kind == "told": use_told()
    if a.kind == "slow": use_slow()
    if a.kind == "tracts": use_tracts()
    import bench_an4 as an4      # now: its rooms learn units and models when they are opened
    change = {k: ast.literal_eval(v) for k, _, v in (s.partition("=") for s in a.set)}
    name = f"{a.units} BPE units" if a.kind == "bpe" else a.kind
    a.small, a.test, a.trained_at = True, False, None
    run = home("runs", f"bench-blocks-{sha256(repr((name, a.seed, change)).encode()).hexdigest()[:8]}-{an4.git_commit()}")
    an4.run_seed(a, an4.SHORT | SHAPES[a.kind] | change, {name: "", **change}, run)
    r, out = read_json(run / "result.json"), an4.OUT / "blocks.json"
    row = dict(what=name, changed=change, seed=a.seed, million_parameters=round(r["parameters"] / 1e6, 2), minutes=r["minutes"], **{k: r[f"dev_{k}_wer"]["errors"] for k in ("greedy", "int8")}, wer=r["dev_wer"]["errors"], words=r["dev_wer"]["words"], measured_by=r["measured_by"], commit=r["commit"])
    rows = [x for x in (read_json(out) if out.is_file() else []) if (x["what"], x["changed"], x["seed"]) != (name, change, a.seed)]
    write_json(out, [*rows, row])
    print(row)


if __name__ == "__main__": main()
