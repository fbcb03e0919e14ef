"""Live speech at the pace of speech: several streams at once, how soon the first word and the final text come. Into reports/benchmarks/live.json.

    python tests/bench_live.py [--streams 8] [--rounds 3]
"""
import argparse, base64, json, os, platform, tempfile, threading, time
from pathlib import Path

import numpy as np
import soxr
from websockets.sync.client import connect

from voicelab.audio import read_audio
from voicelab.core import git_commit, package_path, utc_now, write_json
from voicelab.export import export_bundle
from voicelab.model import load_model
from voicelab.registry import Registry
from voicelab.server import server
from voicelab.synth import make_voicesearch

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "live.json"
RATE, STEP = 24000, .05


def talk(url, samples, out):
    "One person: a second of faint hiss, the clip, hiss until the answer; what came when, in seconds."
    hiss = np.random.default_rng(0).normal(0, 3e-4, RATE).astype(np.float32)
    x = soxr.resample(samples, 16000, RATE)
    begin = 1 + np.flatnonzero(np.abs(x) > .05 * np.abs(x).max())[0] / RATE                 # the true start of speech
    x = np.concatenate([hiss, x, np.tile(hiss, 4)])
    got = dict(kinds={})
    with connect(url.replace("http", "ws") + "/v1/realtime") as ws:
        start = time.perf_counter()
        def listen():
            for message in ws:
                e = json.loads(message)
                got["kinds"].setdefault(e["type"].split(".")[-1], time.perf_counter() - start)
                if e["type"].endswith("completed"):
                    got["text"] = e["transcript"]
                    return
        ear = threading.Thread(target=listen)
        ear.start()
        n = int(STEP * RATE)
        for i in range(0, len(x), n):
            if not ear.is_alive(): break
            time.sleep(max(0, start + (i + n) / RATE - time.perf_counter()))
            ws.send(json.dumps(dict(type="input_audio_buffer.append", audio=base64.b64encode(np.round(np.clip(x[i:i + n], -1, 1) * 32767).astype("<i2").tobytes()).decode())))
        ear.join(20)
    if "text" in got: out.append(dict(first=got["kinds"].get("delta", got["kinds"]["completed"]) - begin, final=got["kinds"]["completed"] - got["kinds"]["speech_stopped"], text=got["text"]))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--streams", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        home, registry = Path(tmp), Registry(Path(tmp) / "registry")
        bundle = export_bundle(load_model(package_path("base")), home / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz")
        registry.promote("voicesearch", registry.register("voicesearch", bundle), "benchmark", "to have a model")
        df = make_voicesearch(home / "clips", dict(test=a.streams * a.rounds), seed=5).query("split == 'test'")
        with server(env=dict(VOICELAB_HOME=str(home), VOICELAB_STREAMS=str(a.streams))) as url:
            out = []
            for r in range(a.rounds):
                rows = df.iloc[r * a.streams:(r + 1) * a.streams]
                threads = [threading.Thread(target=talk, args=(url, read_audio(f), out)) for f in rows.audio_filepath]
                for t in threads: t.start()
                for t in threads: t.join()
    first, final = (np.array([o[k] for o in out]) * 1000 for k in ("first", "final"))
    result = dict(streams=a.streams, utterances=len(df), answered=len(out), first_word_ms=dict(p50=round(np.median(first)), p95=round(np.quantile(first, .95))),
                  final_after_end_ms=dict(p50=round(np.median(final)), p95=round(np.quantile(final, .95))),
                  measured_by=f"python tests/bench_live.py --streams {a.streams} --rounds {a.rounds}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    print(json.dumps(result, indent=1))
    write_json(OUT, result)


if __name__ == "__main__": main()
