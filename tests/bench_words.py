"""When a word was said and how sure it is: word times on digits joined with known gaps, confidence on clean and on noisy speech. Into reports/benchmarks/words.json.

    python tests/bench_words.py [--seed 1] [--strings 200] [--only times confidence]

The base model as it ships. FSDD's recordings are trimmed to the digit, so that where each was laid down is when it was said; its speakers are in no training.
Confidence is fitted to a thousand voices of a corpus that is made for it and AN4's dev speakers, and measured on other people, for words and for whole clips: the default corpus's test voices, and AN4's dev speakers out of fold. What it is fitted to lies under noise as training hears it, what it is measured on under the parts of recordings that no training hears.
"""
import argparse, os, platform, sys, tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from voicelab.audio import read_audio
from voicelab.confidence import both_ways, calibrate, crossed, merits, plot_calibration, utterances
from voicelab.core import git_commit, home, package_path, read_json, utc_now, write_json
from voicelab.evaluate import align, counts
from voicelab.export import export_bundle
from voicelab.importers import import_corpus
from voicelab.model import load_model
from voicelab.noise import add_noise, noise_files, recorded_noise
from voicelab.recognizer import Recognizer
from voicelab.synth import BASE, make_voicesearch

OUT = Path(__file__).parent.parent / "reports" / "benchmarks"


def joined(rows, rng, gaps=(.15, .5)):
    "Digits of one speaker with gaps between them, on a faint hiss: samples, and (word, start, end) of each."
    clips, parts, said, at = [read_audio(f) for f in rows.audio_filepath], [], [], 0
    for text, c in zip(rows.text, clips):
        hush = np.zeros(int(rng.uniform(*gaps) * 16000), np.float32)
        parts += [hush, c]
        said.append((text, (at + len(hush)) / 16000, (at + len(hush) + len(c)) / 16000))
        at += len(hush) + len(c)
    x = np.concatenate([*parts, np.zeros(4000, np.float32)])
    return x + 3e-4 * rng.standard_normal(len(x), dtype=np.float32), said


def times(a, recognizer):
    rng, fsdd = np.random.default_rng(a.seed), import_corpus("fsdd")
    people, off, errors = sorted(fsdd.speaker.unique()), [], []
    strings = [joined(fsdd[fsdd.speaker == people[i % len(people)]].sample(5, random_state=int(rng.integers(2**31))), rng) for i in range(a.strings)]
    for (_, said), r in zip(strings, recognizer.transcribe([x for x, _ in strings])):
        c = counts(" ".join(w for w, _, _ in said), r["text"])
        errors.append((c["errors"], c["words"]))
        i = j = 0
        for op, ref, hyp in align(" ".join(w for w, _, _ in said), r["text"]):
            if op == "=": off.append((r["words"][j]["start"] - said[i][1], r["words"][j]["end"] - said[i][2]))
            i, j = i + bool(ref), j + bool(hyp)
    off, e = 1000 * np.array(off), np.array(errors)
    out = dict(strings=a.strings, words=len(off), wer=round(100 * e[:, 0].sum() / e[:, 1].sum(), 1))
    for k, side in enumerate(("start", "end")):
        d = off[:, k]
        out[side] = dict(median_abs_ms=round(float(np.median(np.abs(d)))), p90_abs_ms=round(float(np.quantile(np.abs(d), .9))), median_ms=round(float(np.median(d))))
    return out


def recorded(clips, rng):
    "The held-out parts of recorded noises at 0 to 20 dB: not what the fit has heard."
    files = list(noise_files())
    return [add_noise(c, recorded_noise(files[int(rng.integers(len(files)))], "heldout"), rng.uniform(0, 20), rng) for c in clips]


def confidence(a, bundle):
    table = make_voicesearch(home("corpora", "base"), BASE, seed=0)
    an4 = import_corpus("an4").query("split == 'dev'")
    some = lambda split, n: table[table.split == split].pipe(lambda t: t.sample(min(n, len(t)), random_state=a.seed))
    more = make_voicesearch(home("corpora", "words-dev"), dict(dev=1000), seed=21)
    dev = pd.concat([more[more.split == "dev"], an4], ignore_index=True)
    made = calibrate(bundle, dev, most=len(dev), seed=a.seed)
    noisy = lambda clips: recorded(clips, np.random.default_rng(a.seed))
    test = both_ways(Recognizer(bundle), some("test", 1000), noisy=noisy)
    raw = test.assign(sure=test.frames, sure_whole=test.groupby(["noise", "clip"]).frames.transform("mean"))
    people = both_ways(Recognizer(bundle), an4, noisy=noisy)
    plot_calibration(test).savefig(OUT / "confidence.png")
    plot_calibration(utterances(test), of="clips").savefig(OUT / "confidence-clips.png")
    show = lambda t: merits(t).round(4).to_dict("records")
    folds, whole = crossed(people), lambda t: merits(utterances(t)).round(4).to_dict("records")
    return dict(weights=made["confidence"], test_voices=show(test), test_voices_before=show(raw), an4_dev_out_of_fold=show(folds),
                utterances=dict(test_voices=whole(test), test_voices_before=whole(raw), an4_dev_out_of_fold=whole(folds)))          # right: not one error in the clip; by_chance: the ece that a perfect confidence would show on so many


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--strings", type=int, default=200)
    p.add_argument("--only", nargs="*", default=["times", "confidence"], choices=["times", "confidence"])
    a, commit = p.parse_args(), git_commit()                         # before pictures are drawn anew
    with tempfile.TemporaryDirectory() as tmp:
        bundle = export_bundle(load_model(package_path("base")), Path(tmp) / "base", dict(name="base"), lm=package_path("base") / "lm.npz")
        result = read_json(OUT / "words.json") if (OUT / "words.json").exists() else {}
        for name in a.only:
            result[name] = times(a, Recognizer(bundle)) if name == "times" else confidence(a, bundle)
            result[name] |= dict(commit=commit, date=utc_now(), measured_by=f"python {' '.join(['tests/bench_words.py', *sys.argv[1:]])}")
            print(name, result[name], flush=True)
    write_json(OUT / "words.json", result | dict(machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
