"""The real server, over real HTTP: formats, bad input, overload, consent on the disk, kill -9, swap, OpenAI's client."""
import asyncio, io, json, os, re, shutil, signal, socket, sqlite3, ssl, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pandas as pd
import psutil
import pytest
import soundfile as sf
import soxr
from conftest import connect, processes, state_with
from websockets.exceptions import InvalidStatus

from voicelab.audio import wav_bytes
from voicelab.core import free_port, write_jsonl
from voicelab.export import toy_tones
from voicelab.keys import Keys
from voicelab.registry import Registry
from voicelab.requestlog import RequestLog
from voicelab.server import server

SAID = "a bad cab"
CLIP = wav_bytes(toy_tones(SAID))


def say(url, path="/v1/audio/transcriptions", clip=CLIP, name="a.wav", headers=None, timeout=60, **data):
    return httpx.post(url + path, files=dict(file=(name, clip)), data=data, headers=headers, timeout=timeout)


def log_of(home, monkeypatch):
    monkeypatch.setenv("VOICELAB_HOME", str(home))
    return RequestLog()


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("docs") / "docs.jsonl", [
        dict(id="1", title="A bad cab", url="https://example.org/cab", text="A bad cab is a cab that does not come."),
        dict(id="2", title="A dead bee", url="https://example.org/bee", text="A bee that is dead.")])


@pytest.fixture(scope="module")
def url(toy_home, docs):
    "A server with the toy model and room for few requests."
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_SEARCH_DOCS=str(docs), VOICELAB_MAX_SECONDS="20", VOICELAB_MAX_BYTES="3000000",
                         VOICELAB_QUEUE="2", VOICELAB_BATCH="2")) as url: yield url


# ---- no torch

def test_serving_imports_no_torch():
    code = ("import sys, voicelab.serve, voicelab.search, voicelab.recognizer; from types import SimpleNamespace as S; from voicelab.serve import *; "
            "build_app(Service(Models(lambda: ('', 'm@1'), lambda *_: S(label='m@1')), None)); "
            "print(sorted({'torch', 'pytorch_lightning', 'lightning', 'wandb', 'IPython', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- every format in, every format out

def encode(samples, rate, channels, kind) -> bytes:
    "The samples as a file of some kind, rate and number of channels."
    x = soxr.resample(samples, 16000, rate) if rate != 16000 else samples
    x = np.repeat(x[:, None], channels, 1).astype(np.float32)
    out = io.BytesIO()
    if kind in ("wav", "flac"):
        sf.write(out, x, rate, format=kind.upper())
        return out.getvalue()
    container, codec = dict(mp3=("mp3", "libmp3lame"), m4a=("mp4", "aac"), webm=("webm", "libopus"))[kind]
    with av.open(out, "w", format=container) as f:
        stream = f.add_stream(codec, rate=rate, layout="stereo" if channels == 2 else "mono")
        frame = av.AudioFrame.from_ndarray((x * 32767).astype(np.int16).reshape(1, -1), "s16", "stereo" if channels == 2 else "mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or 1024)
        for r in [*resampler.resample(frame), *resampler.resample(None)]: f.mux(stream.encode(r))
        f.mux(stream.encode(None))
    return out.getvalue()


@pytest.mark.parametrize("kind,rate,channels", [("wav", 16000, 1), ("wav", 44100, 2), ("wav", 192000, 1), ("wav", 48000, 8), ("flac", 22050, 2), ("flac", 16000, 1),
                                                ("mp3", 44100, 2), ("mp3", 24000, 1), ("m4a", 44100, 2), ("m4a", 48000, 1), ("webm", 48000, 2), ("webm", 48000, 1)])
def test_audio_formats(url, kind, rate, channels):
    r = say(url, clip=encode(toy_tones(SAID), rate, channels, kind), name=f"clip.{kind}")
    assert (r.status_code, r.json()["text"]) == (200, SAID), r.text


def test_low_rate(url):
    "4 kHz has no sounds above 2 kHz: it is decoded, whatever is understood of it."
    r = say(url, clip=encode(toy_tones(SAID), 4000, 1, "wav"))
    assert r.status_code == 200 and abs(r.json()["usage"]["seconds"] - len(toy_tones(SAID)) / 16000) < .02


def test_openai_client(url):
    "The real client reads every answer, and its own types accept them."
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ask = lambda **kw: client.audio.transcriptions.create(file=("a.wav", CLIP), model="whisper-1", **kw)
    plain = ask()
    assert plain.text == SAID and plain.usage.type == "duration"
    assert ask(response_format="text").strip() == SAID
    assert ask(response_format="srt").startswith("1\n00:00:00,")
    assert ask(response_format="vtt").startswith("WEBVTT\n")
    verbose = ask(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert [w.word for w in verbose.words] == SAID.split() and all(w.start < w.end <= verbose.duration for w in verbose.words)
    assert all(v is not None for v in verbose.segments[0].model_dump().values()) and verbose.segments[0].text == SAID
    assert ask(response_format="verbose_json", timestamp_granularities=["segment"]).words is None
    pieces = ask(include=["logprobs"]).logprobs
    assert "".join(p.token for p in pieces) == SAID and all(p.logprob <= 0 and bytes(map(int, p.bytes)).decode() == p.token for p in pieces)
    events = list(ask(stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == events[-1].text == SAID
    assert ask(extra_body={"keywords": ["bad", "cab"]}).text == SAID
    assert [m.id for m in client.models.list()] == ["voicesearch"] and client.models.retrieve("voicesearch").id == "voicesearch"
    raw = client.audio.transcriptions.with_raw_response.create(file=("a.wav", CLIP), model="voicesearch")
    assert (raw.headers["x-voicelab-model"], raw.headers["x-voicelab-logged"]) == ("voicesearch@1", "none") and raw.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as e: client.audio.transcriptions.create(file=("a.wav", CLIP), model="gpt-9")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as e: client.audio.transcriptions.create(file=("a.wav", b"no sound"), model="whisper-1")
    assert e.value.code == "unreadable"


def test_async_client(url):
    "The asynchronous client: several at once, and a stream."
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
            ask = lambda **more: client.audio.transcriptions.create(file=("a.wav", CLIP), model="whisper-1", **more)
            texts = [r.text for r in await asyncio.gather(*(ask() for _ in range(3)))]
            return texts, "".join([e.delta async for e in await ask(stream=True) if e.type == "transcript.text.delta"])
    assert asyncio.run(both()) == ([SAID] * 3, SAID)


def test_search(url):
    r = say(url, "/v1/search").json()
    assert (r["text"], r["results"][0]["title"], r["logged"], r["model"]) == (SAID, "A bad cab", "none", "voicesearch@1")
    assert sorted(r["results"][0]) == ["id", "score", "snippet", "title", "url"]
    scores = [n["score"] for n in r["nbest"]]
    assert r["nbest"][0]["text"] == SAID and len({n["text"] for n in r["nbest"]}) == 5 and scores == sorted(scores, reverse=True) and abs(sum(scores) - 1) < 1e-3
    assert len(say(url, "/v1/search", k="1").json()["results"]) == 1


def test_search_engine_elsewhere(toy_home):
    "A search engine that is plugged in by setting is asked what was heard; when it is gone, callers are told so, and when to come again."
    class Engine(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            body = json.dumps(dict(results=[dict(id="1", title=f"found for {self.path}", url="/1", snippet="")])).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_SEARCH_URL=f"http://127.0.0.1:{engine.server_port}/?q={{query}}&n={{k}}", VOICELAB_LOG_LEVEL="off")) as url:
        assert [p["title"] for p in say(url, "/v1/search", k="3").json()["results"]] == ["found for /?q=a%20bad%20cab&n=3"]
        engine.shutdown()
        engine.server_close()
        r = say(url, "/v1/search")
        assert (r.status_code, r.json()["error"]["code"], int(r.headers["retry-after"])) == (503, "search_unavailable", 5)
        assert say(url).json()["text"] == SAID


# ---- bad input

def raw_form(parts: bytes, kind="multipart/form-data; boundary=x"): return dict(content=parts, headers={"content-type": kind})

POST = "/v1/audio/transcriptions"
BAD = [  # method, path, arguments of httpx, status, code
    ("POST", POST, dict(files=dict(file=("a.wav", b""))), 400, "empty"),
    ("POST", POST, dict(files=dict(file=("a.wav", os.urandom(5000)))), 400, "unreadable"),
    ("POST", POST, dict(files=dict(file=("a.wav", CLIP[:30]))), 400, "unreadable"),
    ("POST", POST, dict(files=dict(file=("a.wav", CLIP[:60]))), 400, None),
    ("POST", POST, dict(files=dict(file=("a.mp3", b"ID3" + b"\0" * 500))), 400, "unreadable"),
    ("POST", POST, dict(files=dict(file=("a.wav", wav_bytes(np.zeros(16000 * 25, np.float32))))), 413, "too_long"),
    ("POST", POST, dict(files=dict(file=("a.wav", b"\0" * 3_000_001))), 413, "too_big"),
    ("POST", POST, dict(files=dict(file=("a.wav", b"\0" * 9_000_000))), 413, "too_big"),
    ("POST", POST, dict(files=dict(sound=("a.wav", CLIP))), 400, "unknown_field"),
    ("POST", POST, dict(files=[("file", ("a.wav", CLIP)), ("file", ("b.wav", CLIP))]), 400, "bad_multipart"),
    ("POST", POST, dict(data=dict(file="text")), 400, "bad_content_type"),
    ("POST", POST, dict(json=dict(file="x")), 400, "bad_content_type"),
    ("POST", POST, dict(), 400, "bad_content_type"),
    ("POST", POST, raw_form(b"no boundary here at all"), 400, "bad_multipart"),
    ("POST", POST, raw_form(b"", "multipart/form-data"), 400, "bad_multipart"),
    ("POST", POST, raw_form(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'), 400, None),
    ("POST", POST, raw_form(b'--x\r\nContent-Disposition: nothing\r\n\r\nabc\r\n--x--\r\n'), 400, "bad_multipart"),
    ("POST", POST, dict(files=dict(file=("a.wav", CLIP)), data={f"f{i}": "1" for i in range(1300)}), 400, "bad_multipart"),
    ("POST", POST, dict(files=dict(file=("a.wav", CLIP)), data=dict(prompt="x" * 100_000)), 400, "bad_multipart"),
    *[("POST", POST, dict(files=dict(file=("a.wav", CLIP)), data=data), status, code) for data, status, code in [
        (dict(response_format="xml"), 400, "invalid_value"), (dict(model="other"), 404, "model_not_found"), (dict(language="fi"), 400, "unsupported_language"),
        (dict(temperature="hot"), 400, "invalid_value"), (dict(temperature="7"), 400, "invalid_value"), (dict(stream="maybe"), 400, "invalid_value"),
        (dict(stream="true", response_format="vtt"), 400, "invalid_value"), ({"include[]": "thoughts"}, 400, "invalid_value"),
        ({"timestamp_granularities[]": "word"}, 400, "invalid_value"), ({"keywords[]": "!!!"}, 400, "invalid_value"), (dict(keywords="x" * 101), 400, "too_long"),
        (dict(hotwords=",".join(f"w{i}" for i in range(1001))), 400, "too_many"), (dict(colour="red"), 400, "unknown_field")]],
    ("POST", "/v1/search", dict(files=dict(file=("a.wav", CLIP)), data=dict(k="0")), 400, "invalid_value"),
    ("POST", "/v1/search", dict(files=dict(file=("a.wav", CLIP)), data=dict(k="many")), 400, "invalid_value"),
    ("POST", "/v1/feedback", dict(content=b"{"), 400, "bad_json"),
    ("POST", "/v1/feedback", dict(content=b"[" * 100_000), 413, "too_big"),
    ("POST", "/v1/feedback", dict(content=b"[" * 60_000), 400, "bad_json"),
    ("POST", "/v1/feedback", dict(json=[1]), 400, "bad_json"),
    ("POST", "/v1/feedback", dict(json=dict(correct=True)), 400, "missing_field"),
    ("POST", "/v1/feedback", dict(json=dict(request_id="x", correct="yes")), 400, "wrong_type"),
    ("POST", "/v1/feedback", dict(json=dict(request_id="x", correct=True, correction="y" * 3000)), 400, "too_long"),
    ("GET", "/v1/models/none", dict(), 404, "model_not_found"), ("GET", "/nowhere", dict(), 404, "not_found"), ("GET", "/v1/nowhere/at/all", dict(), 404, "not_found"),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", dict(), 404, "not_found"), ("GET", POST, dict(), 405, "method_not_allowed"), ("DELETE", "/v1/models", dict(), 405, "method_not_allowed"),
    ("GET", "/v1/models", dict(headers={"origin": "https://evil.example"}), 403, "foreign_origin"),
    ("GET", "/v1/models", dict(headers={"host": "rebound.example:8000", "origin": "http://rebound.example:8000"}), 403, "foreign_host"),
    ("GET", "/v1/models", dict(headers={"x-request-id": "../../x"}), 400, "invalid_value"),
]

@pytest.mark.parametrize("method,path,how,status,code", BAD, ids=lambda v: v if isinstance(v, str) and len(v) < 30 else "")
def test_bad_input(url, method, path, how, status, code):
    r = httpx.request(method, url + path, timeout=30, **how)
    assert r.status_code == status, r.text
    error = r.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"] and error["message"] and (code is None or error["code"] == code), error
    assert r.headers["x-voicelab-model"] == "voicesearch@1" and r.headers["x-voicelab-logged"] == "none" and r.headers["x-request-id"]
    assert not re.search(r"Traceback|/work|/tmp|site-packages|\.py\b", r.text)


def test_still_well(url):
    "After all that, it works."
    assert say(url).json()["text"] == SAID


# ---- overload

def test_a_client_that_vanishes_is_no_failure_of_the_server(url):
    "Half a request and a closed connection: counted as the client's doing, and the next is served."
    host = url.removeprefix("http://")
    count = lambda status: sum(float(n) for n in re.findall(rf'^voicelab_requests_total{{.*status="{status}".*}} (\S+)$', httpx.get(f"{url}/metrics", timeout=60).text, re.M))
    gone, failed, end = count(499), count(500), time.time() + 60
    while time.time() < end and count(499) < gone + 3:  # one that vanishes before its request has begun is seen by nobody: more come until three were seen
        with socket.create_connection(host.split(":")) as s:
            s.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\n".encode())
            time.sleep(.3)
    assert count(499) >= gone + 3 and count(500) == failed
    assert say(url).json()["text"] == SAID


def test_overload(url):
    "Many at once: each gets its words or a 503 with Retry-After, and afterwards all is as before."
    clip = wav_bytes(np.concatenate([toy_tones(SAID)] * 12))
    with ThreadPoolExecutor(48) as pool: answers = list(pool.map(lambda _: say(url, clip=clip), range(144)))
    codes = pd.Series([r.status_code for r in answers]).value_counts().to_dict()
    assert set(codes) == {200, 503}, codes
    for r in answers:
        if r.status_code == 503: assert int(r.headers["retry-after"]) >= 1 and r.json()["error"]["code"] == "overloaded"
        else: assert r.json()["text"].startswith(SAID)
    assert say(url).status_code == 200
    text = httpx.get(f"{url}/metrics", timeout=60).text
    assert f'voicelab_rejects_total{{reason="overloaded"}} {codes[503]}.0' in text and "voicelab_requests_inside 0.0" in text


# ---- the page, the documentation, the metrics

def test_pages_and_metrics(url):
    for path in ("/", "/docs", "/ops", "/app.js", "/recorder.js", "/style.css", "/icon.svg"):
        r = httpx.get(url + path, timeout=60)
        assert r.status_code == 200 and "script-src 'self'" in r.headers["content-security-policy"] and r.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(src|href)=\"(https?:)?//", r.text), f"{path} loads something from elsewhere"
    routes = httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert {"/v1/audio/transcriptions", "/v1/search", "/v1/feedback", "/v1/subjects/{subject}", "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(routes)
    say(url)
    assert 'voicelab_requests_total{endpoint="/v1/audio/transcriptions",status="200"}' in httpx.get(f"{url}/metrics", timeout=60).text
    assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "ok" and httpx.get(f"{url}/readyz", timeout=60).json()["model"] == "voicesearch@1"


def test_ray_stays_on_loopback(url):
    "No process of Ray listens on an address that others can reach."
    port_owners = set()
    for proc in Path("/proc").glob("[0-9]*"):
        try: line = (proc / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError: continue
        if not (line.startswith(b"ray::") or b"voicelab-ray-" in line): continue
        try: port_owners |= {os.readlink(f)[8:-1] for f in (proc / "fd").iterdir() if os.readlink(f).startswith("socket:[")}
        except OSError: continue
    assert port_owners
    for table, loopback in (("tcp", {"0100007F"}), ("tcp6", {"00000000000000000000000001000000", "0000000000000000FFFF00000100007F"})):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in port_owners: assert fields[1].split(":")[0] in loopback, line


# ---- consent, and what is on the disk

def holds(folder, needle: bytes): return [str(p) for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink() and needle in p.read_bytes()]


def test_nothing_without_consent(url, toy_home):
    "Words and voice of requests without consent are nowhere on the disk: not in our state, not in Ray's or other temporary files."
    planted, sound = "dead fed bead cafe", toy_tones("dead fed bead cafe")
    clip = wav_bytes(sound + 1e-3 * np.random.default_rng(7).standard_normal(len(sound)).astype(np.float32))     # a sound that is nowhere else
    needle = clip[20_000:20_400]
    for consent in (None, "none", "transcript,faces", "metrics", "training"):
        headers = {"x-voicelab-subject": "planted-person"} | ({"x-voicelab-consent": consent} if consent else {})
        for path in (POST, "/v1/search"):
            r = say(url, path, clip=clip, headers=headers)
            assert r.json()["text"] == planted
            assert r.headers["x-voicelab-logged"] == ("metrics" if consent in ("metrics", "training") else "none")
    ours = [p for p in Path("/tmp").glob("voicelab-ray-*")]
    for place in (toy_home, *ours):
        for secret in (planted.encode(), needle, b"planted-person"): assert holds(place, secret) == []
    say(url, clip=clip, headers={"x-voicelab-consent": "transcript,audio"})
    assert holds(toy_home, planted.encode()) and holds(toy_home, needle)        # the search finds what is there


def test_big_upload_is_not_spooled(url, toy_home):
    "An upload above a megabyte stays in memory: the server opens no temporary file for it."
    clip = wav_bytes(np.tile(toy_tones(SAID), 30)[:16000 * 19])
    clip = clip + b"\0" * (2_500_000 - len(clip))
    done = threading.Event()
    seen = []
    def look():
        while not done.is_set():
            for proc in Path("/proc").glob("[0-9]*"):
                try:
                    if not (proc / "cmdline").read_bytes().startswith(b"ray::ServeReplica"): continue
                    seen.extend(t for f in (proc / "fd").iterdir() if "(deleted)" in (t := os.readlink(f)) and "/tmp/" in t and "/tmp/voicelab-ray" not in t)
                except OSError: continue
    watcher = threading.Thread(target=look)
    watcher.start()
    try: assert say(url, clip=clip).status_code == 200
    finally: done.set(); watcher.join()
    assert seen == []


def test_person_can_judge_and_take_back(url, toy_home, monkeypatch):
    log = log_of(toy_home, monkeypatch)
    r = say(url, "/v1/search", headers={"x-voicelab-consent": "transcript,audio", "x-voicelab-region": "NO", "x-voicelab-device": "phone"})
    rid, receipt = r.headers["x-request-id"], r.headers["x-voicelab-receipt"]
    row = log.rows().set_index("request_id").loc[rid]
    assert (row.text, row.region, row.device, row.model, row.status, row.words) == (SAID, "NO", "phone", "voicesearch@1", 200, 3)
    assert row.latency_ms > 0 and abs(row.duration - len(toy_tones(SAID)) / 16000) < .01 and row.loudness_db < 0 and Path(row.audio_path).read_bytes() == CLIP
    told = httpx.post(f"{url}/v1/feedback", json=dict(request_id=rid, correct=False, correction="a bad cab ahead"))
    assert told.json()["logged"] == "transcript" == told.headers["x-voicelab-logged"]
    assert log.rows().set_index("request_id").correction[rid] == "a bad cab ahead"
    assert httpx.delete(f"{url}/v1/subjects/{receipt}", timeout=60).json() == dict(deleted=True, rows=1, audio=1, tasks=0, labels=0, models=[], datasets=0)
    assert rid not in set(log.rows().request_id) and not Path(row.audio_path).exists() and holds(toy_home, b"a bad cab ahead") == []
    assert httpx.post(f"{url}/v1/feedback", json=dict(request_id=rid, correct=True)).json()["logged"] == "none"


def test_failed_requests_are_measured_with_consent(url, toy_home, monkeypatch):
    r = say(url, clip=b"no sound", headers={"x-voicelab-consent": "metrics,audio,transcript"})
    assert (r.status_code, r.headers["x-voicelab-logged"]) == (400, "metrics")
    row = log_of(toy_home, monkeypatch).rows().set_index("request_id").loc[r.headers["x-request-id"]]
    assert row.status == 400 and pd.isna(row.text) and pd.isna(row.audio_path)


def test_a_request_id_used_twice(url, toy_home, monkeypatch):
    "Two people's apps choose the same request id: the first one's recording and words stay as they were, the second is answered and told that nothing was kept."
    other, named, sound = "dead fed bead cafe", {"x-request-id": "the-app-s-own-id", "x-voicelab-consent": "transcript,audio"}, toy_tones("dead fed bead cafe")
    clip = wav_bytes(sound + 1e-3 * np.random.default_rng(8).standard_normal(len(sound)).astype(np.float32))     # a sound that is nowhere else
    first, second = say(url, headers=named), say(url, clip=clip, headers=named)
    assert [(r.json()["text"], r.headers["x-voicelab-logged"]) for r in (first, second)] == [(SAID, "audio"), (other, "none")]
    assert "x-voicelab-receipt" not in second.headers
    log = log_of(toy_home, monkeypatch)
    row = log.rows().set_index("request_id").loc["the-app-s-own-id"]
    assert (row.text, Path(row.audio_path).read_bytes()) == (SAID, CLIP) and holds(toy_home / "log", clip[20_000:20_400]) == []
    assert httpx.delete(f"{url}/v1/subjects/{first.headers['x-voicelab-receipt']}", timeout=60).json()["rows"] == 1 and not Path(row.audio_path).exists()
    assert say(url, headers=named).headers["x-voicelab-logged"] == "none"          # what was erased does not come back under its name


def test_locked_log_does_not_fail_requests(url, toy_home, monkeypatch):
    "With the log's database locked the answers still come, say that nothing was kept, and each loss is counted; who did not want to be logged does not wait."
    lost = lambda: float(re.search(r"^voicelab_log_failures_total (\S+)", httpx.get(f"{url}/metrics", timeout=60).text, re.M)[1])
    before = lost()
    recordings = lambda: sorted((toy_home / "log" / "audio").rglob("*.*"))
    before_audio = recordings()
    db = sqlite3.connect(toy_home / "log" / "requests.sqlite", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        with ThreadPoolExecutor(5) as pool:
            wanted = [pool.submit(say, url, headers={"x-voicelab-consent": "transcript,audio"}) for _ in range(3)]
            others = [say(url) for _ in range(10)]
            assert not any(w.done() for w in wanted), "it waits for nobody's lock"
            wanted = [w.result() for w in wanted]
    finally: db.execute("ROLLBACK"); db.close()
    assert {(r.status_code, r.json()["text"], r.headers["x-voicelab-logged"]) for r in [*wanted, *others]} == {(200, SAID, "none")}
    assert lost() == before + 3
    assert recordings() == before_audio, "a recording stays of which the caller was told that nothing was kept"
    assert say(url, headers={"x-voicelab-consent": "transcript"}).headers["x-voicelab-logged"] == "transcript"


# ---- a new champion, and the hard way out

def test_swap_under_load_then_kill(toy_home, docs, tmp_path, monkeypatch, request):
    """A new champion, and a rollback, are served without a restart and without a failed request, a damaged one and one without its file are refused;
    then kill -9: every acknowledged row and recording is there, and a new server starts."""
    home = state_with(toy_home / "registry" / "voicesearch" / "1", tmp_path)
    monkeypatch.setenv("VOICELAB_HOME", str(home))
    registry, answers, done = Registry(), [], threading.Event()
    request.addfinalizer(done.set)      # the load ends with the test, however it ends
    with server(env=dict(VOICELAB_HOME=str(home), VOICELAB_SEARCH_DOCS=str(docs))) as url:
        def load():
            while not done.is_set() and len(answers) < 5000:
                try: answers.append(say(url, headers={"x-voicelab-consent": "audio,transcript", "x-voicelab-subject": "load"}))
                except httpx.HTTPError as e: answers.append(e)
        workers = [threading.Thread(target=load, daemon=True) for _ in range(3)]
        for w in workers: w.start()
        def until(model, seconds=90):
            end = time.time() + seconds
            while time.time() < end and httpx.get(f"{url}/readyz", timeout=60).json()["model"] != model: time.sleep(.2)
            assert httpx.get(f"{url}/readyz", timeout=60).json()["model"] == model
        second = registry.register("voicesearch", registry.get("voicesearch", 1))
        registry.promote("voicesearch", second, "tests", "swap")
        until("voicesearch@2")
        third = registry.register("voicesearch", registry.get("voicesearch", 1))
        onnx = registry.get("voicesearch", third) / "model.onnx"
        onnx.chmod(0o644)
        onnx.write_bytes(onnx.read_bytes()[:-100])
        with closing(sqlite3.connect(home / "registry" / "registry.sqlite")) as db, db:     # the registry itself would refuse: damaged after the move, then
            db.execute("UPDATE aliases SET version = ? WHERE alias = 'champion'", (third,))
        end = time.time() + 90
        while time.time() < end and not httpx.get(f"{url}/readyz", timeout=60).json()["problem"]: time.sleep(.2)
        assert httpx.get(f"{url}/readyz", timeout=60).json() == dict(status="ready", model="voicesearch@2", problem=True)
        fourth = registry.register("voicesearch", registry.get("voicesearch", 1))
        registry.get("voicesearch", fourth).chmod(0o755)
        (registry.get("voicesearch", fourth) / "model.onnx").unlink()
        with closing(sqlite3.connect(home / "registry" / "registry.sqlite")) as db, db: db.execute("UPDATE aliases SET version = ? WHERE alias = 'champion'", (fourth,))
        end = time.time() + 90
        while time.time() < end and 'model_swaps_total{outcome="failed"} 2.0' not in httpx.get(f"{url}/metrics", timeout=60).text: time.sleep(.2)
        assert httpx.get(f"{url}/readyz", timeout=60).json() == dict(status="ready", model="voicesearch@2", problem=True)
        registry.rollback("voicesearch", "tests", "back")
        until("voicesearch@1")
        done.set()
        for w in workers: w.join()
        assert {getattr(r, "status_code", r) for r in answers} == {200} and {r.json()["text"] for r in answers} == {SAID}
        assert {r.headers["x-voicelab-model"] for r in answers} == {"voicesearch@1", "voicesearch@2"}

        kept, more = {r.headers["x-request-id"] for r in answers if r.headers["x-voicelab-logged"] == "audio"}, []
        assert len(kept) == len(answers)
        def until_dead():
            while True:
                try: r = say(url, headers={"x-voicelab-consent": "audio,transcript"}, timeout=20)
                except httpx.HTTPError: return
                if r.headers.get("x-voicelab-logged") == "audio": more.append(r.headers["x-request-id"])
                elif r.status_code >= 500: return
        workers = [threading.Thread(target=until_dead) for _ in range(3)]
        for w in workers: w.start()
        end = time.time() + 60
        while time.time() < end and len(more) < 6: time.sleep(.05)
        mine = processes(home)
        assert mine
        for p in mine:
            with suppress(psutil.NoSuchProcess): p.kill()
        for w in workers: w.join()
    assert more
    rows = RequestLog().rows().set_index("request_id")
    assert kept | set(more) <= set(rows.index)
    for rid in more[-5:]: assert Path(rows.audio_path[rid]).read_bytes() == CLIP and rows.text[rid] == SAID
    assert RequestLog().verify_audit()["broken_at"] is None
    with server(env=dict(VOICELAB_HOME=str(home), VOICELAB_SEARCH_DOCS=str(docs))) as url: assert say(url).json()["text"] == SAID
    end = time.time() + 30
    while time.time() < end and (left := processes(home)): time.sleep(.2)
    assert left == []       # and nothing of it stays


# ---- what a serving machine installs

def steps(root) -> list:
    "The Containerfile's instructions in order: (name, text)."
    return [tuple(line.split(" ", 1)) for line in (root / "Containerfile").read_text().splitlines() if line and line[0] != "#"]


def test_containerfile_step_by_step(toy_home, tmp_path):
    """What the Containerfile says, done in a virtual environment: what it installs and copies is enough (and holds no torch); the server refuses an open
    address without a key, and with one it starts, is found healthy, answers, and stops when told."""
    uv, root, did = Path(sys.executable).parent / "uv", Path(__file__).parent.parent, steps(Path(__file__).parent.parent)
    run = lambda *args, **kw: subprocess.run(args, check=True, capture_output=True, text=True, timeout=600, **kw)
    here = lambda text: re.sub(r"(?<=[= ])/(app|state)\b", lambda m: f"{tmp_path}/{m[1]}", text)      # the container's folders, below ours
    run(uv, "venv", "-q", "--python", sys.executable, tmp_path / "venv")
    (tmp_path / "app").mkdir()
    env = dict(PATH=f"{tmp_path}/venv/bin:{os.environ['PATH']}", HOME=str(tmp_path), RAY_USAGE_STATS_ENABLED="0")
    for name, text in did:
        if name == "ENV": env |= dict(pair.split("=", 1) for pair in here(text).split())
        elif name == "COPY":
            source, target = text.split()
            (shutil.copytree if (root / source).is_dir() else shutil.copy)(root / source, tmp_path / "app" / target)
        elif name == "RUN" and text.startswith("python -m pip install "):             # by uv, from its cache
            run(uv, "pip", "install", "-q", "--python", tmp_path / "venv", *text.split()[4:], cwd=tmp_path / "app")
        else: assert name in ("FROM", "WORKDIR", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD") or text.startswith("useradd "), (name, text)
    names = [n for n, _ in did]
    assert dict(did)["USER"] not in ("0", "root") and names.index("USER") < names.index("ENTRYPOINT") and names.count("USER") == 1
    there = run(uv, "pip", "list", "--python", tmp_path / "venv").stdout
    assert not re.search(r"^(torch|pytorch-lightning|wandb|jupyterlab|kaldi-native-fbank)\b", there, re.M)

    shutil.copytree(toy_home, tmp_path / "state", ignore=shutil.ignore_patterns("keys", "log"))
    entry, serve, port = json.loads(dict(did)["ENTRYPOINT"]), json.loads(dict(did)["CMD"]), free_port()
    env["VOICELAB_PORT"], cwd = str(port), tmp_path / "app"
    healthy = lambda: subprocess.run(dict(did)["HEALTHCHECK"].split(" CMD ")[1], shell=True, env=env, cwd=cwd, capture_output=True, timeout=60).returncode == 0
    alone = subprocess.run([*entry, *serve], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 2 and "make an API key first" in alone.stderr and not healthy()
    key = run(*entry, "keys", "add", "app", env=env, cwd=cwd).stdout.strip()
    proc = subprocess.Popen([*entry, *serve], env=env | dict(VOICELAB_BEHIND_PROXY="1"), cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.time() + 300
        while time.time() < end and proc.poll() is None and not healthy(): time.sleep(.5)
        assert proc.poll() is None and healthy()
        ask = lambda **headers: httpx.post(f"http://127.0.0.1:{port}/v1/audio/transcriptions", files=dict(file=("a.wav", CLIP)), data=dict(model="voicesearch"), headers=headers, timeout=60)
        assert ask().status_code == 401 and ask(authorization=f"Bearer {key}").json()["text"] == SAID
        proc.send_signal(getattr(signal, dict(did)["STOPSIGNAL"]))
        assert proc.wait(60) == 0 and [json.loads(l)["status"] for l in proc.stderr if '"request"' in l] == [401, 200]
    finally:
        try: os.killpg(proc.pid, signal.SIGKILL)
        except ProcessLookupError: pass


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl on this machine to make a certificate with")
def test_https_and_keys(toy_home, tmp_path):
    "A certificate and a key for each app: speech by HTTPS and by a secure WebSocket, and nothing without a key."
    cert, private, keys = tmp_path / "cert.pem", tmp_path / "key.pem", Keys(tmp_path / "api.json")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", private, "-out", cert], check=True, capture_output=True)
    app = keys.add("app")
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_KEYS=str(keys.path), VOICELAB_TLS_CERT=str(cert), VOICELAB_TLS_KEY=str(private))) as url:
        trust = ssl.create_default_context(cafile=cert)
        assert url.startswith("https")
        with pytest.raises(httpx.HTTPError): httpx.get(url.replace("https", "http") + "/healthz")
        mine = [p for p in Path("/tmp").glob("voicelab-ray-*") if (p / "tls.pem").is_symlink() and (p / "tls.pem").resolve() == cert.resolve()]
        assert len(mine) == 1 and mine[0].stat().st_mode & 0o777 == 0o700, "others can enter the folder of the sockets"
        assert (mine[0] / "tls.pem.key").resolve() == private.resolve(), "the private key was copied"
        def ask(**headers): return httpx.post(f"{url}/v1/audio/transcriptions", files=dict(file=("a.wav", CLIP)), headers=headers, verify=trust, timeout=60)
        assert ask().status_code == 401
        assert ask(authorization=f"Bearer {app}").json()["text"] == SAID
        assert httpx.get(f"{url}/metrics", verify=trust, headers=dict(authorization=f"Bearer {app}")).status_code == 403
        with connect(url.replace("https", "wss") + "/vosk", ssl=trust, additional_headers=dict(authorization=f"Bearer {app}")) as ws:
            ws.send('{"eof" : 1}')
            assert json.loads(ws.recv()) == dict(text="")
        with pytest.raises(InvalidStatus) as e: connect(url.replace("https", "wss") + "/vosk", ssl=trust)
        assert (e.value.response.status_code, json.loads(e.value.response.body)["error"]["code"]) == (401, "invalid_api_key")
        keys.remove("app")
        assert ask(authorization=f"Bearer {app}").status_code == 401                     # without a restart


# ---- the log on PostgreSQL

def test_postgresql(postgres, tmp_path, monkeypatch):
    "The same log on PostgreSQL: append, concurrent writers, feedback, reading, the append-only audit, erasure, purge."
    import sqlalchemy as sa
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path))
    log = RequestLog(postgres)
    row = dict(model="m@1", text=SAID, confidence=.9, words=3, duration=1.5, latency_ms=30., status=200)
    assert log.append(dict(row, request_id="r1"), "transcript,audio", "anna", CLIP) == "audio"
    assert log.append(dict(row, request_id="r2"), "metrics", "anna", CLIP) == "metrics"
    assert log.append(dict(row, request_id="r3"), None, "anna", CLIP) == "none"
    other = RequestLog(postgres)                                              # a second one finds its tables
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda i: (log, other)[i % 2].append(dict(row, request_id=f"c{i}"), "transcript", "bob"), range(40)))
    assert log.feedback("r1", False, "a bad cab ahead") == "transcript" and log.feedback("r3", True) == "none"
    df = log.rows().set_index("request_id")
    assert len(df) == 42 and df.correction["r1"] == "a bad cab ahead" and pd.isna(df.text["r2"]) and Path(df.audio_path["r1"]).read_bytes() == CLIP
    assert log.verify_audit()["broken_at"] is None
    for sql in ("UPDATE audit SET action = 'x'", "DELETE FROM audit", "TRUNCATE audit"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), log._write() as c: c.exec_driver_sql(sql)
    assert log.erase("anna")["rows"] == 2 and log.erased(["r1", "c0"]) == {"r1"} and not Path(df.audio_path["r1"]).exists()
    assert log.purge()["rows"] == 0 and log.stats()["rows"] == 40
    log.close(), other.close()
