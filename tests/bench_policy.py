"""What the audio policy does to transcripts, and what it costs: clean and in recorded noise, AN4's dev speakers. Into reports/benchmarks/policy.json.

    python tests/bench_policy.py [--model BUNDLE] [--seeds 3]

One model that has not been trained on such clips reads them as they are, evened out in loudness, with the silence around the speech cut off, and both; and as a live stream gives them, cut by the listener's end-pointing, evened out. Noise is of the parts that no training hears. WER over
the whole set with a 95 % interval of the difference to the clips as they are (paired bootstrap by speaker); CPU time of one core, beside that of the recogniser. Then the base model is fine-tuned on AN4's training speakers as the quick profile does it, with the policy and without, some seeds each.
"""
import argparse, json, os, platform, sys, tempfile, time
from pathlib import Path

import numpy as np

from voicelab.audio import read_audio
from voicelab.core import git_commit, home, package_path, utc_now, write_json
from voicelab.evaluate import TorchRecognizer, counts, paired_bootstrap
from voicelab.export import export_bundle
from voicelab.importers import import_corpus
from voicelab.listen import Listener
from voicelab.model import load_model
from voicelab.noise import add_noise, recorded_noise
from voicelab.policy import Policy, even_out, prepare, remove_dc, trim
from voicelab.recognizer import Recognizer
from voicelab.train import QUICK, TrainConfig, train

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "policy.json"


def live(x):
    "What a live stream with this policy hears: cut by the listener, which is given 100 ms at a time; evened out by what was said."
    ear, said = Listener(), []
    for i in range(0, len(x), 1600): said += [what for kind, what in ear.feed(x[i:i + 1600]) if kind != "started"]
    said += [u for u in [ear.commit()] if u]
    return [prepare(u.samples, Policy(), trim=False)[0] for u in said]


WAYS = {"as they are": lambda x: [x], "evened out": lambda x: [even_out(remove_dc(x))], "trimmed": lambda x: [trim(x)], "both": lambda x: [prepare(x, Policy())[0]], "live": live}


def trained(t, clips, seeds):
    "WER on the clips of models that were fine-tuned with the policy and without."
    rows, table = [], import_corpus("an4").query("split != 'test'").reset_index(drop=True)
    for seed in range(seeds):
        for name, policy in dict(none={}, level=dict(level=True, trim=False), both=dict(level=True, trim=True)).items():
            run = home("runs", f"bench-policy-{name}-{seed}-{git_commit()}")
            train(table.query("split == 'train'"), run, TrainConfig(**QUICK | dict(seed=seed, workers=1, policy=policy)), init="base", log=False)
            ear = TorchRecognizer(run)
            for world, xs in clips.items():
                c = [counts(text, ear.transcribe([x])[0]["text"]) for text, x in zip(t.text, xs)]
                rows.append(dict(seed=seed, trained_with=name, world=world, errors=sum(x["errors"] for x in c), words=sum(x["words"] for x in c)))
                print(rows[-1], flush=True)
    return rows


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", help="a bundle; by default the base model as it ships")
    p.add_argument("--seeds", type=int, default=3, help="of the fine-tuned models; 0: none")
    a = p.parse_args()
    t = import_corpus("an4").query("split == 'dev'").reset_index(drop=True)
    clean, rng, rows = [read_audio(f) for f in t.audio_filepath], np.random.default_rng(0), []
    worlds = {"clean": clean} | {f"{name}, {db} dB": [add_noise(x, recorded_noise(name, "heldout"), db, rng) for x in clean] for name in ("street", "kitchen") for db in (10, 5)}
    with tempfile.TemporaryDirectory() as tmp:
        r = Recognizer(a.model or export_bundle(load_model(package_path("base")), Path(tmp) / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz"), threads=1)
        for world, clips in worlds.items():
            before = None
            for way, f in WAYS.items():
                start = time.process_time()
                made = [f(x) for x in clips]
                cost, start = time.process_time() - start, time.process_time()
                c = [counts(text, " ".join(y["text"] for y in r.transcribe(x))) for text, x in zip(t.text, made)]
                errors, words, read = np.array([x["errors"] for x in c]), np.array([x["words"] for x in c]), time.process_time() - start
                before = errors if before is None else before
                d, seconds = paired_bootstrap(before, errors, words, t.speaker), sum(map(len, clips)) / 16000
                rows.append(dict(world=world, way=way, errors=int(errors.sum()), words=int(words.sum()), wer=round(100 * d["wer_b"], 2), points=round(100 * d["diff"], 2), lo=round(100 * d["lo"], 2), hi=round(100 * d["hi"], 2),
                                 seconds_kept=round(sum(len(y) for x in made for y in x) / 16000 / seconds, 3), cpu_ms_a_second=round(1000 * cost / seconds, 2), recogniser_ms_a_second=round(1000 * read / seconds, 2)))
                print(rows[-1], flush=True)
    write_json(OUT, dict(rows=rows, trained=trained(t, worlds, a.seeds), model=a.model or "base", command=f"python {' '.join(['tests/bench_policy.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
