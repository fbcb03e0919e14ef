"""A training that is killed with -9 goes on and ends with the same weights."""
import json, os, signal, subprocess, sys

import numpy as np
import torch

from voicelab.audio import write_wav
from voicelab.export import toy_tones

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


def test_killed_training_resumes_to_the_same_weights(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        text = "".join(rng.choice(list("abcd"), 3))
        write_wav(tmp_path / f"{i}.wav", toy_tones(text))
        rows.append(dict(audio_filepath=f"{i}.wav", duration=len(toy_tones(text)) / 16000, text=text, speaker="s", split="train", utterance_id=str(i)))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
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
