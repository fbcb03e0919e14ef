"""Backup and restore from the outside: while a real server writes, into a new home that serves, and over PostgreSQL."""
import json, os, subprocess, sys, threading, time
from pathlib import Path

import httpx
import pandas as pd
import pytest

from conftest import state_with
from voicelab.audio import wav_bytes, write_wav
from voicelab.export import export_bundle, toy_tones
from voicelab.recognizer import Recognizer
from voicelab.registry import Registry
from voicelab.requestlog import RequestLog
from voicelab.server import server

SAID = "a bad cab"
CLIP = wav_bytes(toy_tones(SAID))


def voicelab(*args, home, **env):
    "Exit code, what was printed as JSON, the error."
    done = subprocess.run([Path(sys.executable).parent / "voicelab", *map(str, args)], capture_output=True, text=True, timeout=300, env=dict(os.environ, VOICELAB_HOME=str(home), **env))
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def ask(url, consent="transcript,audio,training", subject="anna"):
    return httpx.post(f"{url}/v1/audio/transcriptions", files=dict(file=("a.wav", CLIP)), headers={"x-voicelab-consent": consent, "x-voicelab-subject": subject}, timeout=60)


def test_backup_under_load_restores_and_serves(toy_home, tmp_path, monkeypatch, request):
    "Every request that was acknowledged before the backup began is in it; the restored home serves, and a restore over it keeps an erasure."
    home, file, answers, done = state_with(toy_home / "registry" / "voicesearch" / "1", tmp_path / "home"), tmp_path / "b.tar.gz", [], threading.Event()
    request.addfinalizer(done.set)
    with server(env=dict(VOICELAB_HOME=str(home))) as url:
        def load():
            while not done.is_set() and len(answers) < 3000: answers.append(ask(url))
        workers = [threading.Thread(target=load, daemon=True) for _ in range(2)]
        for w in workers: w.start()
        while len(answers) < 5: time.sleep(.05)
        ask(url, subject="bea")
        before = {r.headers["x-request-id"] for r in list(answers)}
        code, report, err = voicelab("backup", file, "--json", home=home)
        assert (code, report["damaged"], report["audio_missing"]) == (0, [], 0), err
        assert voicelab("restore", file, "--force", home=home)[::2] == (2, f"error: a server or another program has the request log of {home} open; stop it first\n")
        done.set()
        for w in workers: w.join()
        assert {(r.status_code, r.headers["x-voicelab-logged"]) for r in answers} == {(200, "audio")}
    new = tmp_path / "new"
    code, back, err = voicelab("restore", file, "--json", home=new)
    assert (code, back["requests"], back["audit_broken_at"]) == (0, report["requests"], None), err
    monkeypatch.setenv("VOICELAB_HOME", str(new))
    log = RequestLog()
    rows = log.rows().set_index("request_id")
    log.close()
    assert before <= set(rows.index) and all(Path(p).read_bytes() == CLIP for p in rows.audio_path)
    with server(env=dict(VOICELAB_HOME=str(new))) as url:
        assert ask(url).json()["text"] == SAID
        assert httpx.delete(f"{url}/v1/subjects/bea", timeout=60).json()["rows"] == 1            # the key of the pseudonyms came along
    code, again, err = voicelab("restore", file, "--force", "--json", home=new)
    assert (code, again["erased"], again["requests"]) == (0, 1, back["requests"] - 1), err


def test_restored_model_repeats_its_golden_answers(tmp_path, monkeypatch):
    from voicelab.core import package_path
    from voicelab.model import load_model
    if not (package_path("base") / "model.pt").exists(): pytest.skip("voicelab/base has no model yet")
    clip = write_wav(tmp_path / "golden.wav", toy_tones(SAID))
    bundle = export_bundle(load_model(package_path("base")), tmp_path / "bundle", dict(name="base"), golden=pd.DataFrame([dict(audio_filepath=str(clip))]), lm=package_path("base") / "lm.npz")
    home = state_with(bundle, tmp_path / "home")
    assert voicelab("backup", tmp_path / "b.tar.gz", "--without-data", "--json", home=home)[0] == 0
    assert voicelab("restore", tmp_path / "b.tar.gz", "--json", home=tmp_path / "new")[0] == 0
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path / "new"))
    golden = Recognizer(Registry().resolve()[0]).check_golden()
    assert golden["ok"] and golden["checked"] == 1 and golden["differ"] == [], golden


def test_a_backup_of_a_damaged_model_is_made_and_says_so(toy_home, tmp_path):
    home = state_with(toy_home / "registry" / "voicesearch" / "1", tmp_path / "home")
    (home / "registry" / "voicesearch" / "1" / "tokens.txt").write_text("x")
    code, report, _ = voicelab("backup", tmp_path / "b.tar.gz", "--json", home=home)
    assert code == 1 and "voicesearch@1" in report["damaged"][0] and "tokens.txt has sha256" in report["damaged"][0]
    code, back, err = voicelab("restore", tmp_path / "b.tar.gz", "--json", home=tmp_path / "new")
    assert (code, back["damaged"]) == (0, report["damaged"]), err


def test_postgresql(postgres, toy_home, tmp_path, monkeypatch):
    "A log on PostgreSQL goes into a backup, and back into SQLite or into an empty PostgreSQL; one that holds rows is left alone."
    import sqlalchemy as sa
    home, file = state_with(toy_home / "registry" / "voicesearch" / "1", tmp_path / "home"), tmp_path / "b.tar.gz"
    monkeypatch.setenv("VOICELAB_HOME", str(home))
    log = RequestLog(postgres)
    for i in range(3): log.append(dict(model="m@1", text=SAID, request_id=f"r{i}", status=200), "transcript,audio", f"p{i}", CLIP)
    log.erase("p2")
    code, report, err = voicelab("backup", file, "--json", home=home, VOICELAB_LOG_URL=postgres)
    assert (code, report["requests"], report["audio"]) == (0, 2, 2), err
    code, _, err = voicelab("restore", file, home=tmp_path / "other", VOICELAB_LOG_URL=postgres)
    assert code == 2 and "holds rows; a log is restored into an empty database" in err and not (tmp_path / "other" / "registry").exists()
    engine = sa.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as c: c.exec_driver_sql("CREATE DATABASE fresh")
    engine.dispose()
    fresh = postgres.replace("/postgres", "/fresh")
    for name, url in (("lite", ""), ("pg", fresh)):
        code, back, err = voicelab("restore", file, "--json", home=tmp_path / name, VOICELAB_LOG_URL=url)
        assert (code, back["requests"]) == (0, 2), err
        monkeypatch.setenv("VOICELAB_HOME", str(tmp_path / name))
        there = RequestLog(url or None)
        assert set(there.rows().request_id) == {"r0", "r1"} and there.erased(["r2"]) == {"r2"} and there.verify_audit()["broken_at"] is None
        assert there.erase("p0") == dict(rows=1, audio=1, request_ids=["r0"])
        there.close()
    assert not list((tmp_path / "pg" / "log").glob("*.sqlite*"))
    log.close()
