"""Trainings as a user meets them: one that is killed goes on to the same weights; a pretrained encoder goes the way of our own model."""
import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import torch

from voicelab.audio import write_wav
from voicelab.export import check_bundle, export_bundle, toy_tones
from voicelab.manifest import read_manifest
from voicelab.model import load_model
from voicelab.recognizer import Recognizer
from voicelab.train import TrainConfig, train

SCRIPT = """
import sys
from voicelab.manifest import read_manifest
from voicelab.train import TrainConfig, train
cfg = TrainConfig(epochs=8, batch_seconds=8, lr=5e-3, dim=24, layers=1, average=2, check_every=8, workers=0, noise_only=0., augment=dict(room=0., phone=0.))
train(read_manifest(sys.argv[1]), sys.argv[2], cfg, log=False)
"""


def start(manifest, out):
    env = dict(os.environ, OMP_NUM_THREADS="1", VOICELAB_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(manifest), str(out)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tones(folder, n=24):
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        text = "".join(rng.choice(list("abcd"), 3))
        write_wav(folder / f"{i}.wav", toy_tones(text))
        rows.append(dict(audio_filepath=f"{i}.wav", duration=len(toy_tones(text)) / 16000, text=text, speaker="s", split="train", utterance_id=str(i)))
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "m.jsonl"


def test_killed_training_resumes_to_the_same_weights(tmp_path):
    tones(tmp_path)
    whole, killed = (start(tmp_path / "m.jsonl", tmp_path / n) for n in ("whole", "killed"))
    for line in killed.stdout:
        if line.startswith("epoch 3/"): break
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.pt").exists()
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    again = start(tmp_path / "m.jsonl", tmp_path / "killed")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "epoch 1/" not in out and "epoch 8/" in out, out
    a, b = (torch.load(tmp_path / n / "model.pt", weights_only=True) for n in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_pretrained_encoder_trains_exports_and_serves(tmp_path, monkeypatch):
    "A small wav2vec 2.0 with random weights goes the same way as our own model: training, a run's folder, export, checks, recogniser."
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path / "home"))
    table = read_manifest(tones(tmp_path)).assign(split=["train"] * 20 + ["dev"] * 4)
    cfg = TrainConfig(encoder="TINY_WAV2VEC2", epochs=2, batch_seconds=8, lr=1e-3, average=1, check_every=2, workers=0, noise_only=0., augment=dict(room=0., phone=0.))
    assert train(table, tmp_path / "run", cfg, log=False)["parameters"] > 10_000
    model = load_model(tmp_path / "run")
    bundle = export_bundle(model, tmp_path / "bundle", dict(name="tiny"), lm=tmp_path / "run" / "lm.npz")
    checks = check_bundle(bundle, model, table)
    assert checks.ok.all() and "batch equals single" in set(checks.check), checks.to_string()
    r, clips = Recognizer(bundle), [toy_tones("abc"), toy_tones("dad")]
    assert r.frame == .02 and r.check_golden()["ok"] and len(r.transcribe(clips)) == 2
    assert abs(len(r.log_probs(clips)[0]) * r.frame - len(clips[0]) / 16000) < .03


def test_pretrained_weights_that_cannot_be_fetched(tmp_path):
    "Without a network: one clear error, no half of a run."
    done = subprocess.run([Path(sys.executable).parent / "voicelab", "train", "--manifest", tones(tmp_path), "--out", tmp_path / "run", "-p", "encoder=WAV2VEC2_BASE"],
                          env=dict(os.environ, https_proxy="http://127.0.0.1:9", TORCH_HOME=str(tmp_path / "torch"), VOICELAB_HOME=str(tmp_path / "home")), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "cannot fetch the weights of WAV2VEC2_BASE" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "model.pt").exists()
