"""Keywords given with a request, on names that no training has heard: WER on the keywords' words and on the rest, with distractors; time with the building of the keywords' tree, kept from request to request (`seconds_ratio`) or not (`_cold`). Into reports/benchmarks/keywords.json.

    python tests/bench_keywords.py [--seed 12] [--clips 200]      # seed 11 is for choosing
"""
import argparse, os, platform, sys, tempfile, time
from pathlib import Path

import numpy as np

from voicelab.audio import read_audio
from voicelab.core import git_commit, package_path, utc_now, write_json
from voicelab.decode import Keywords, _tree, decode
from voicelab.evaluate import align
from voicelab.export import export_bundle
from voicelab.model import load_model
from voicelab.recognizer import Recognizer
from voicelab.synth import entity_lists, make_voicesearch

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "keywords.json"


def split_errors(ref, hyp, words):
    "Errors and reference words: (on the keywords' words, on the others), as in Le et al., Contextualized streaming end-to-end speech recognition, 2021."
    out = np.zeros((2, 2), int)
    for op, r, h in align(ref, hyp):
        side = 0 if (r or h) in words else 1
        out[side] += (op != "=", op != "ins")
    return out


def recognise(probabilities, clips, fusion, given, how):
    "Each clip as a request of its own that brings its list: texts, CPU seconds when no tree is kept between two clips, and when it is."
    took = {}
    for kept in (False, True):
        start = time.process_time()
        hyps = []
        for lp, c in zip(probabilities, clips):
            if not kept: _tree.cache_clear()
            hyps.append(decode(lp, len(c) / 16000, fusion=fusion, keywords=Keywords(given, **how) if given else None)["text"])
        took[kept] = time.process_time() - start
    return hyps, took[False], took[True]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=12)
    p.add_argument("--clips", type=int, default=200)
    p.add_argument("--bonus", type=float, nargs="*", default=[], help="others than the default, to try")
    a = p.parse_args()
    lists, rng = entity_lists(), np.random.default_rng(a.seed)
    names = lists["new_names"]
    others = sorted({f"{f} {l}" for f in lists["first_names"] for l in lists["last_names"]} - set(names))
    with tempfile.TemporaryDirectory() as tmp:
        df = make_voicesearch(Path(tmp) / "clips", dict(new_names=a.clips, test=a.clips), seed=a.seed)
        r = Recognizer(export_bundle(load_model(package_path("base")), Path(tmp) / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz"))
        clips = [read_audio(f) for f in df.audio_filepath]
        probabilities = r.log_probs(clips)
    said = (df["slice"] == "new_names").to_numpy()              # the other half says none of the keywords
    result, words, first = dict(clips=int(said.sum()), clips_without=int((~said).sum()), names=len(names)), {w for n in names for w in f"{n} {n}'s".split()}, None
    for n in (0, 100, 1000):
        for bonus in a.bonus or [None]:
            given = rng.permutation([*names, *rng.choice(others, n - len(names), replace=False)]).tolist() if n else []
            hyps, cold, warm = recognise(probabilities, clips, r.fusion, given, {} if bonus is None else dict(bonus=bonus))
            errors = np.array([split_errors(t, h, words) for t, h in zip(df.text, hyps)])                   # (clips, side, errors and words)
            (b, bn), (u, un) = errors[said].sum(0).tolist()
            none, total = errors[~said].sum((0, 1)).tolist()
            first = first or warm
            row = dict(wer=round(100 * (b + u) / (bn + un), 2), b_wer=round(100 * b / bn, 2), u_wer=round(100 * u / un, 2), b_words=bn, u_words=un,
                       wer_where_none_is_said=round(100 * none / total, 2), words_there=total, clip_ms=round(1000 * warm / len(clips), 2), clip_ms_cold=round(1000 * cold / len(clips), 2),
                       seconds_ratio=round(warm / first, 2), seconds_ratio_cold=round(cold / first, 2))
            result[f"{n} keywords" + ("" if bonus is None or not n else f", bonus {bonus:g}")] = row
            print(n, bonus, row, flush=True)
            if not n: break
    result |= dict(measured_by=f"python {' '.join(['tests/bench_keywords.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    if not a.bonus: write_json(OUT, result)


if __name__ == "__main__": main()
