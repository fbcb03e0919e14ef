"""Audio, manifests and versions where a notebook cell does not reach: kills, races, bombs, downloads, whole corpora."""
import http.server
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from voicelab import importers, manifest
from voicelab.audio import AudioError, decode_audio, read_audio, toy_speech, write_wav
from voicelab.core import InputError, setting
from voicelab.verify import inspect, noise_evidence, noise_verdict, verify


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty working state."
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


def corpus(folder, n=6, seed=0, **fields):
    "A small manifest of toy clips."
    rows = [dict(audio_filepath=str(write_wav(folder/f"{seed}-{i}.wav", toy_speech(.3, seed=seed * 100 + i))), duration=.3, text=f"clip {i}", speaker=f"s{i}",
                 split="train", utterance_id=f"{seed}-{i}", source="toy", slice="") | fields for i in range(n)]
    return pd.DataFrame(rows)


def files(folder):
    "Every file below a folder, without the lock."
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")


WRITER = """
import sys, time, pandas as pd
from voicelab import manifest
df = manifest.read_manifest(sys.argv[1])
put = manifest._put_blob
def slow(data, suffix):
    time.sleep(float(sys.argv[3]))
    return put(data, suffix)
manifest._put_blob = slow
print(manifest.write_version(df, sys.argv[2]), flush=True)
"""


def writer(path, name, pause):
    "A process that writes a version, pausing before each clip."
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(pause)], stdout=subprocess.PIPE, text=True, env=os.environ)


def test_kill_while_writing(home, tmp_path):
    df = corpus(tmp_path/"c")
    path = manifest.write_manifest(df, tmp_path/"c"/"m.jsonl")
    kept = manifest.write_version(df.head(2), "kept")
    p = writer(path, "killed", .3)
    deadline = time.time() + 60
    while len(list((home/"data"/"blobs").rglob("*.wav"))) < 4 and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert manifest.list_versions().id.tolist() == [kept]           # nothing half-written has a name
    assert len(list((home/"data"/"blobs").rglob("*.wav"))) >= 4
    manifest.sweep()                                                # the lock died with the process, the leftovers go
    assert len(list((home/"data"/"blobs").rglob("*.wav"))) == 2
    assert len(manifest.load_version(kept, check_audio=True)) == 2
    assert len(manifest.load_version(manifest.write_version(df, "killed"), check_audio=True)) == 6


def test_two_writers_share_audio(home, tmp_path):
    path = manifest.write_manifest(corpus(tmp_path/"c"), tmp_path/"c"/"m.jsonl")
    running = [writer(path, "a", .02) for _ in range(2)]
    ids = [manifest.write_version(manifest.read_manifest(path), "b")] + [p.communicate(timeout=120)[0].strip() for p in running]
    assert all(p.returncode == 0 for p in running) and ids[1] == ids[2] != ids[0]
    assert sorted(manifest.list_versions().id) == sorted(set(ids))
    assert len(list((home/"data"/"blobs").rglob("*.wav"))) == 6
    for v in set(ids): assert len(manifest.load_version(v, check_audio=True)) == 6


def test_failed_row_leaves_nothing(home, tmp_path):
    df = corpus(tmp_path/"c")
    with pytest.raises(InputError, match="row 6"): manifest.write_version(df.assign(audio_filepath=[*df.audio_filepath[:5], "/nowhere.wav"]), "x")
    assert files(home) == []


def test_erasing_from_many_versions_at_once(home, tmp_path):
    df = corpus(tmp_path/"c")
    df["subject"] = [f"p{i % 3}" for i in range(6)]
    versions = [manifest.write_version(df, "a"), manifest.write_version(df.head(4), "b"), manifest.write_version(df.iloc[[1, 4]], "c")]
    report = {}
    threads = [threading.Thread(target=lambda s=s: report.update({s: manifest.erase_subject(s)})) for s in ("p0", "p1")]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sum(len(r) for r in report.values()) == 5 and set(versions) <= {v for r in report.values() for v in r}
    for v in manifest.list_versions().query("not withdrawn").id: assert set(manifest.load_version(v, check_audio=True).subject) == {"p2"}
    assert len(list((home/"data"/"blobs").rglob("*.wav"))) == 2
    manifest.erase_subject("p2")
    assert manifest.list_versions().query("not withdrawn").empty
    assert not list((home/"data"/"blobs").rglob("*.wav")) and not list((home/"data").rglob("manifest.jsonl"))


def test_damage_is_noticed(home, tmp_path):
    v = manifest.write_version(corpus(tmp_path/"c"), "x")
    rng = random.Random(0)
    for path in [home/"data"/v/"manifest.jsonl", *sorted((home/"data"/"blobs").rglob("*.wav"))[:3]]:
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        with pytest.raises(InputError, match="damaged"): manifest.load_version(v, check_audio=True)
        path.write_bytes(data)
    assert len(manifest.load_version(v, check_audio=True)) == 6


# --- downloads -------------------------------------------------------------------------------------------------------

class Files(http.server.SimpleHTTPRequestHandler):
    "A quiet file server that can cut a body short."
    cut = 0
    def log_message(self, *a): pass
    def copyfile(self, source, out): out.write(source.read()[:-self.cut or None])


@pytest.fixture
def site(tmp_path):
    "(folder, base URL) of a local web server."
    (tmp_path/"www").mkdir()
    handler = type("H", (Files,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path/"www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path/"www", f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def test_fetch_fsdd(home, tmp_path, site, monkeypatch):
    www, url, handler = site
    monkeypatch.setenv("VOICELAB_CORPORA", "")
    for d in range(10):
        for k in (0, 6, 20): write_wav(tmp_path/"src"/f"{d}_theo_{k}.wav", toy_speech(.4, seed=d)[::2], rate=8000)
    with tarfile.open(www/"fsdd.tar.gz", "w:gz") as tar: tar.add(tmp_path/"src", "free-spoken-digit-dataset-1.0.10/recordings")
    monkeypatch.setitem(importers._SOURCES, "fsdd", dict(url=f"{url}/fsdd.tar.gz", licence="CC BY-SA 4.0", clips=30))
    handler.cut = 500                                              # the connection breaks before the end
    with pytest.raises(InputError, match="fsdd"): importers.import_corpus("fsdd")
    assert files(home) == []
    handler.cut = 0
    df = importers.import_corpus("fsdd")                            # downloads
    assert df.split.value_counts().to_dict() == dict(train=10, dev=10, test=10)
    (www/"fsdd.tar.gz").unlink()
    assert len(importers.import_corpus("fsdd")) == 30               # is there now
    monkeypatch.setitem(importers._SOURCES, "an4", dict(url=f"{url}/gone.tar.gz", licence="", clips=1))
    with pytest.raises(InputError, match=r"cannot fetch an4 from .* put it under VOICELAB_CORPORA/an4"): importers.import_corpus("an4")


# --- hostile audio ---------------------------------------------------------------------------------------------------

BOMB = """
import io, resource, struct, sys, time
import av, numpy as np, soundfile as sf
from voicelab.audio import AudioError, decode_audio, toy_speech
buf = io.BytesIO()
if sys.argv[1] == "m4a":
    with av.open(buf, "w", format="mp4") as box:
        s = box.add_stream("aac", rate=16000, layout="mono")
        f = av.AudioFrame.from_ndarray((toy_speech(.5) * 32767).astype(np.int16)[None], format="s16", layout="mono")
        f.sample_rate, f.pts = 16000, 0
        box.mux(s.encode(f)); box.mux(s.encode(None))
    data = bytearray(buf.getvalue())
    for name, at in ((b"stsz", 12), (b"stsc", 16), (b"stts", 12)): struct.pack_into(">I", data, data.find(name) + at, 60_000_000)
    struct.pack_into(">I", data, data.find(b"stsz") + 8, 1)
else:
    with sf.SoundFile(buf, "w", 192000, 8, format="FLAC") as f:
        for _ in range(60): f.write(np.zeros((192000, 8), np.int16))
    data = bytearray(buf.getvalue())
before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try: decode_audio(bytes(data), max_seconds=20); print("decoded")
except AudioError as e: print(e.code)
print(len(data), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.perf_counter() - t)
"""


@pytest.mark.parametrize("kind,code", [("m4a", "unreadable"), ("flac", "too_long")])
def test_bombs_stay_small(kind, code):
    out = subprocess.run([sys.executable, "-c", BOMB, kind], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == code and int(out[2]) < 100 and float(out[3]) < 20, out       # MB grown, seconds


def test_random_bytes_never_raise_another_error():
    rng = np.random.default_rng(7)
    starts = [b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00", b"fLaC\x00\x00\x00\x22", b"OggS\x00\x02", b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x18ftypM4A ", b"ID3\x04\x00", b"\xff\xfb\x90\x64", b"\xff\xf1\x50\x80", b""]
    for i in range(900):
        data = starts[i % 9] + rng.bytes(int(rng.integers(1, 4000)))
        try: x, _ = decode_audio(data, max_seconds=20)
        except AudioError as e: assert e.code and "\n" not in str(e) and len(str(e)) < 300
        else: assert np.isfinite(x).all() and len(x) <= 20 * 16000


def test_playlists_are_not_followed(tmp_path):
    secret = write_wav(tmp_path/"secret.wav", toy_speech(.5))
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n", f"ffconcat version 1.0\nfile '{secret}'\n", f"<MPD><BaseURL>file://{secret}</BaseURL></MPD>"):
        with pytest.raises(AudioError) as e: decode_audio(text.encode())
        assert e.value.code == "unreadable"


# --- whole corpora ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["an4", "fsdd"])
def test_real_corpora_are_clean(name):
    "No recording of a person is called bad."
    if not setting("CORPORA") or not (Path(setting("CORPORA"))/name).is_dir(): pytest.skip(f"no {name} under CORPORA")
    df = importers.import_corpus(name)
    problems = verify(df, inspect(df), shared_speakers=name == "fsdd")
    errors = problems[problems.severity == "error"]
    assert errors.empty, errors.head().to_string()
    assert (problems.problem == "noise_not_speech").sum() <= len(df) // 1000


def test_recorded_noise_is_found():
    "Most pieces of a recorded street with a transcript are named."
    path = Path(setting("CORPORA") or "none")/"noise"/"street_cars_bike.flac"
    if not path.is_file(): pytest.skip("no noise under CORPORA")
    x = read_audio(path)
    pieces = [noise_verdict(noise_evidence(x[i:i + 32000]), 2.0) for i in range(0, len(x) - 32000, 48000)]
    assert np.mean([v != "" for v in pieces]) > .85 and np.mean([v == "error" for v in pieces]) > .5, pieces
