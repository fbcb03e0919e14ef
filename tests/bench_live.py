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


def realtime(ws, x16):
    "Send as OpenAI's protocol wants it."
    ws.send(json.dumps(dict(type="input_audio_buffer.append", audio=base64.b64encode(x16.tobytes()).decode())))


def vosk(ws, x16):
    "Send as vosk-server wants it."
    ws.send(x16.tobytes())


def heard(e, got, now):
    "Note when a message of either protocol brought the first words, the end-point and the final text."
    kind = e.get("type", "").split(".")[-1]
    if kind == "delta": got["deltas"] += e["delta"]
    if kind == "delta" or e.get("partial"): got.setdefault("first", now)
    if kind == "speech_stopped": got["stopped"] = now
    if kind == "completed" or e.get("text"): got |= dict(final=now, text=e.get("transcript", e.get("text")))
    return "final" in got


def talk(url, samples, send, out):
    "One person: a second of faint hiss, the clip, hiss until the answer; what came when, in seconds."
    hiss = np.random.default_rng(0).normal(0, 3e-4, RATE).astype(np.float32)
    x = soxr.resample(samples, 16000, RATE)
    begin = 1 + np.flatnonzero(np.abs(x) > .05 * np.abs(x).max())[0] / RATE                 # the true start of speech
    x = np.round(np.clip(np.concatenate([hiss, x, np.tile(hiss, 4)]), -1, 1) * 32767).astype("<i2")
    got = dict(deltas="")
    with connect(url.replace("http", "ws") + ("/v1/realtime" if send is realtime else "/vosk")) as ws:
        if send is vosk: ws.send(json.dumps(dict(config=dict(sample_rate=RATE))))
        start = time.perf_counter()
        def listen():
            for message in ws:
                if heard(json.loads(message), got, time.perf_counter() - start): return
        ear = threading.Thread(target=listen)
        ear.start()
        n = int(STEP * RATE)
        for i in range(0, len(x), n):
            if not ear.is_alive(): break
            time.sleep(max(0, start + (i + n) / RATE - time.perf_counter()))
            send(ws, x[i:i + n])
        ear.join(20)
    if "final" in got: out.append(dict(first=got.get("first", got["final"]) - begin, final=got["final"] - got.get("stopped", np.nan), add_up=got["deltas"] == got["text"]))


def spread(values):
    values = 1000 * np.array(values)
    return dict(p50=round(np.median(values)), p95=round(np.quantile(values, .95)))


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
            result = dict(streams=a.streams, utterances=len(df))
            for send in (realtime, vosk):
                out = []
                for r in range(a.rounds):
                    rows = df.iloc[r * a.streams:(r + 1) * a.streams]
                    threads = [threading.Thread(target=talk, args=(url, read_audio(f), send, out)) for f in rows.audio_filepath]
                    for t in threads: t.start()
                    for t in threads: t.join()
                result[send.__name__] = dict(answered=len(out), first_words_ms=spread([o["first"] for o in out]))
                if send is realtime: result["realtime"] |= dict(final_after_end_ms=spread([o["final"] for o in out]), deltas_add_up=round(float(np.mean([o["add_up"] for o in out])), 2))
    result |= dict(measured_by=f"python tests/bench_live.py --streams {a.streams} --rounds {a.rounds}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores")
    print(json.dumps(result, indent=1))
    write_json(OUT, result)


if __name__ == "__main__": main()
