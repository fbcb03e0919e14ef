"""Trainings as a user meets them: one that is killed goes on to the same weights; a pretrained encoder goes the way of our own model."""
import json, os, shutil, signal, struct, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
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


def test_train_refuses_bad_rows_by_id(tmp_path):
    "`voicelab train` names the rows that verification calls errors before the first step, and trains without them only when told to."
    manifest = tones(tmp_path)
    (tmp_path / "3.wav").write_bytes((tmp_path / "3.wav").read_bytes()[:30])
    shutil.copy(tmp_path / "5.wav", tmp_path / "7.wav")                       # the sound of 5 under the text of 7, in another split
    shutil.copy(tmp_path / "11.wav", tmp_path / "12.wav")                     # one sound under two texts: one of them is wrong
    rows = [json.loads(l) | (dict(split="dev") if i == 7 else dict(text="привет") if i == 9 else {}) for i, l in enumerate(manifest.read_text().splitlines())]
    manifest.write_text("".join(json.dumps(r | dict(speaker="d" if r["split"] == "dev" else "s")) + "\n" for r in rows))
    def call(*more): return subprocess.run([Path(sys.executable).parent / "voicelab", "train", "--manifest", manifest, "--out", tmp_path / "run", *more, *"-p epochs=1 -p batch_seconds=8 -p dim=24 -p layers=1 -p average=1 -p workers=0".split()],
                                           env=dict(os.environ, VOICELAB_HOME=str(tmp_path / "home")), capture_output=True, text=True, timeout=300)
    done = call()
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: 4 of 24 rows are bad"), done.stderr
    assert all(s in said[0] for s in ("3: unreadable", "7: duplicate_audio", "12: duplicate_audio", "9: unknown_characters", "--skip-bad")) and not (tmp_path / "run").exists(), done.stderr
    done = call("--skip-bad", "--json")
    assert done.returncode == 0 and "left out: 4 of 24 rows" in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["clips"] == 20


def test_sweep_of_the_command_line(tmp_path):
    "`voicelab sweep` names bad rows before a trial starts; without them it trains few epochs with fixed tables and a rate by rule, ranks the trials and ends with 0."
    manifest = tones(tmp_path)
    rows = [json.loads(l) | dict(split="dev" if i >= 20 else "train", speaker="d" if i >= 20 else "s") for i, l in enumerate(manifest.read_text().splitlines())]
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "3.wav").write_bytes((tmp_path / "3.wav").read_bytes()[:30])
    def call(*more): return subprocess.run([Path(sys.executable).parent / "voicelab", "sweep", "--manifest", manifest, "--out", tmp_path / "sweep", *more],
                                           env=dict(os.environ, VOICELAB_HOME=str(tmp_path / "home"), VOICELAB_THREADS="1"), capture_output=True, text=True, timeout=420)
    fixed = [x for p in ("epochs=1,2", "dim=24", "layers=1", "average=1", "workers=0", "batch_seconds=240", 'augment={"room": 0, "phone": 0}') for x in ("-p", p)]
    done = call(*fixed)
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: 3 of 24 rows are bad: 3: unreadable"), done.stderr
    assert "--skip-bad" in done.stderr and not (tmp_path / "sweep").exists()
    done = call("-p", "augment=0.2")
    assert done.returncode == 2 and done.stderr == "error: parameter 'augment=0.2': augment must be one JSON object\n", done.stderr
    done = call(*fixed, "--skip-bad", "--trials", "2", "--json")
    assert done.returncode == 0 and "left out: 3 of 24 rows" in done.stderr, done.stderr
    table = json.loads(done.stdout[done.stdout.index("["):])
    assert sorted((r["epochs"], r["epochs_run"], r["lr"], r["ended"]) for r in table) == [(1, 1, 2e-3, "done"), (2, 2, 2e-3, "done")], table
    assert [r["dev_wer"] for r in table] == sorted(r["dev_wer"] for r in table) and (tmp_path / "sweep" / "sweep.csv").is_file()
    assert {json.loads((tmp_path / "sweep" / r["trial"] / "run.json").read_text())["train"]["augment"]["room"] for r in table} == {0}


def wandb_records(path):
    "The records of an offline run: protobufs in the blocks of a LevelDB log, behind a header of 7 bytes."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768; continue           # the padding of a block
        _, n, kind = struct.unpack("<IHB", data[at:at + 7])
        if not kind: at += 32768 - at % 32768; continue
        part, at = part + data[at + 7:at + 7 + n], at + 7 + n
        if kind in (1, 4):                                                      # the whole, or its last part
            yield Record.FromString(part)
            part = b""


def test_wandb_mirrors_a_run_and_goes_on_with_it(tmp_path, monkeypatch):
    "The offline run's own files hold configuration, curve, learning rate, and transcripts, sound and spectrogram of the panel; a training that is interrupted goes on in the same W&B run."
    from voicelab.train import Keeper
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for key in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"): monkeypatch.setenv(key, str(tmp_path / "home" / "wandb"))
    table = read_manifest(tones(tmp_path)).assign(split=["train"] * 20 + ["dev"] * 4)
    cfg = TrainConfig(epochs=3, batch_seconds=8, dim=24, layers=1, average=1, check_every=1, workers=0, noise_only=0., augment=dict(room=0., phone=0.))
    real = Keeper.on_train_epoch_end
    def stop(self, trainer, module):
        real(self, trainer, module)
        if trainer.current_epoch == 1: raise KeyError("the power is gone")
    monkeypatch.setattr(Keeper, "on_train_epoch_end", stop)
    with pytest.raises(KeyError): train(table, tmp_path / "run", cfg)
    monkeypatch.setattr(Keeper, "on_train_epoch_end", real)
    train(table, tmp_path / "run", cfg)
    name = json.loads((tmp_path / "run" / "run.json").read_text())["wandb"]
    files = sorted((tmp_path / "home" / "wandb").rglob("*.wandb"))
    assert len(files) == 2 and {f.name for f in files} == {f"run-{name}.wandb"}, files
    records = [r for f in files for r in wandb_records(f)]
    config = {u.key or ".".join(u.nested_key): json.loads(u.value_json) for r in records for u in [*r.run.config.update, *r.config.update]}
    assert config["lr"] == cfg.lr and config["dim"] == 24, config
    history = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]
    for key in ("train/loss", "dev/loss", "dev/wer", "train/lr", "audio_seconds_per_second"): assert len([h for h in history if key in h]) >= 2, (key, history)      # the epoch that was cut short may not have told all
    assert sum(any(k.split(".")[0] == "panel" for k in h) for h in history) == 3, history
    held = [json.loads(p.read_text()) for f in files for p in (f.parent / "files" / "media" / "table").rglob("*.json")]
    assert all(set(t["columns"]) >= {"said", "heard"} for t in held) and all({row[0] for row in t["data"]} == set(table.text[20:]) for t in held)
    for kind, ending in (("audio", ".wav"), ("images", ".png")):
        media = [p for f in files for p in (f.parent / "files" / "media" / kind).rglob(f"*{ending}")]
        assert len(media) == 2 * 4 and all(p.stat().st_size > 500 for p in media), media              # four clips, by each of the two processes
