"""Recognition on one core, clips of 2 to 5 s: voicelab, sherpa-onnx with the same exported model, pocketsphinx with its own English model.

Each candidate is a process of its own, bound to one core, one after the other in several rounds; speeds are compared as ratios within a round.
Clips are decoded before; features, model and search are timed. Into reports/benchmarks/speed.json.
"""
import argparse, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from voicelab.audio import read_audio
from voicelab.core import git_commit, package_path, utc_now, write_json
from voicelab.evaluate import wer
from voicelab.importers import import_corpus

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "speed.json"
POCKETSPHINX = "pocketsphinx==5.1.1"
HEAD = """
import json, os, sys, time
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
import numpy as np
clips = list(np.load(sys.argv[1]).values())
"""
TAIL = """
read(clips[0])
start = time.perf_counter()
texts = [read(c) for c in clips]
print(json.dumps(dict(seconds=time.perf_counter() - start, mb=next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024, torch="torch" in sys.modules, texts=texts)))
"""
VOICELAB = """
from voicelab.recognizer import Recognizer
r = Recognizer(sys.argv[2], sys.argv[3], lm=None if sys.argv[4] == "lm" else "none")
def read(c): return r.transcribe([c])[0]["text"]
"""
SHERPA = """
import sherpa_onnx
r = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model=f"{sys.argv[2]}/{sys.argv[3]}", tokens=f"{sys.argv[2]}/tokens.txt", num_threads=1)
def read(c):
    s = r.create_stream()
    s.accept_waveform(16000, c)
    r.decode_stream(s)
    return " ".join(s.result.text.split())
"""
SPHINX = """
from pocketsphinx import Decoder
d = Decoder(samprate=16000, loglevel="FATAL")
def read(c):
    d.start_utt()
    d.process_raw((c * 32767).astype("<i2").tobytes(), full_utt=True)
    d.end_utt()
    return d.hyp().hypstr if d.hyp() else ""
"""


def candidates(bundle):
    python, uv = [sys.executable, "-c"], [str(Path(sys.executable).parent / "uv"), "run", "-q", "--no-project", "--python", sys.executable, "--with", POCKETSPHINX, "--with", "numpy", "python", "-c"]
    return {"voicelab": [*python, HEAD + VOICELAB + TAIL, "CLIPS", bundle, "float32", "greedy"], "voicelab int8": [*python, HEAD + VOICELAB + TAIL, "CLIPS", bundle, "int8", "greedy"],
            "voicelab with its language model": [*python, HEAD + VOICELAB + TAIL, "CLIPS", bundle, "float32", "lm"], "sherpa-onnx": [*python, HEAD + SHERPA + TAIL, "CLIPS", bundle, "model.onnx"],
            "sherpa-onnx int8": [*python, HEAD + SHERPA + TAIL, "CLIPS", bundle, "model.int8.onnx"], "pocketsphinx": [*uv, HEAD + SPHINX + TAIL, "CLIPS"]}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--clips", type=int, default=40)
    a = p.parse_args()
    from voicelab.export import export_bundle
    from voicelab.model import load_model
    tmp = Path(tempfile.mkdtemp())
    bundle = export_bundle(load_model(package_path("base")), tmp / "base", dict(name="base"), lm=package_path("base") / "lm.npz")
    rows = import_corpus("an4").query("split == 'dev' and 2 <= duration <= 5").head(a.clips)
    clips = [read_audio(f) for f in rows.audio_filepath]
    np.savez(tmp / "clips.npz", *clips)
    audio_s = sum(map(len, clips)) / 16000
    print(f"{len(clips)} clips, {audio_s:.0f} s", flush=True)
    got = []
    for n in range(a.rounds):
        for name, command in candidates(bundle).items():
            if name == "pocketsphinx" and n >= 2: continue       # slow, and steady
            done = subprocess.run([str(tmp / "clips.npz") if c == "CLIPS" else str(c) for c in command], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
            if done.returncode: raise SystemExit(f"{name} failed: {done.stderr[-500:]}")
            r = json.loads(done.stdout.strip().splitlines()[-1])
            got.append(dict(name=name, round=n, speed=audio_s / r["seconds"], mb=r["mb"], torch=r["torch"], wer=wer(rows.text, r["texts"])))
    t = pd.DataFrame(got)
    ours = t[t.name == "voicelab"].set_index("round").speed
    table = pd.DataFrame({n: dict(realtime=g.speed.median(), voicelab_is_faster=(ours.reindex(g["round"]).to_numpy() / g.speed.to_numpy()).mean(), lowest=(ours.reindex(g["round"]).to_numpy() / g.speed.to_numpy()).min(),
                                  mb=g.mb.max(), wer=100 * g.wer.iloc[0], torch=bool(g.torch.any())) for n, g in t.groupby("name", sort=False)}).T
    print(table.to_string())
    write_json(OUT, dict(rounds=a.rounds, clips=len(clips), audio_s=round(audio_s, 1), table=json.loads(table.to_json(orient="index")), commit=git_commit(), date=utc_now(),
                         measured_by=f"python {' '.join(['tests/bench_speed.py', *sys.argv[1:]])}", machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
