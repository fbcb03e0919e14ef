"""What an operator sees of the real server: lines, metrics, spans, and a stop that breaks nothing."""
import http.server, json, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from conftest import connect, processes, state_with
from websockets.exceptions import ConnectionClosed

from voicelab.audio import wav_bytes
from voicelab.core import free_port
from voicelab.export import toy_tones
from voicelab.requestlog import RequestLog

SAID = "a bad cab"
CLIP = wav_bytes(toy_tones(SAID))
BODY = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + CLIP + b"\r\n--x--\r\n"
HEAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
LONG = wav_bytes(np.tile(toy_tones(SAID), 18))


class Running:
    "A server as an operator starts it: its process, its address, its standard error by and by."
    def __init__(self, home, **env):
        self.port = free_port()
        self.url, self.err = f"http://127.0.0.1:{self.port}", []
        self.proc = subprocess.Popen([Path(sys.executable).parent / "voicelab", "serve", "--port", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                     env=dict(os.environ, VOICELAB_HOME=str(home), **env), start_new_session=True)
        self.reader = threading.Thread(target=lambda: self.err.extend(self.proc.stderr), daemon=True)
        self.reader.start()
        end = time.time() + 300
        while time.time() < end and self.proc.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200: return
            except httpx.HTTPError: time.sleep(.2)
        raise AssertionError("".join(self.err))

    def say(self, path="/v1/audio/transcriptions", clip=CLIP, **headers):
        return httpx.post(self.url + path, files=dict(file=("my-secret-name.wav", clip)), headers={k.replace("_", "-"): v for k, v in headers.items()}, timeout=120)

    def figures(self): return httpx.get(f"{self.url}/metrics", timeout=30).text

    def figure(self, name): return float(re.search(rf"^{re.escape(name)} (\S+)$", self.figures(), re.M)[1])

    def wait_for_open(self, n):
        "Until the server has so many requests that are not answered, besides this question."
        end = time.time() + 60
        while (there := self.figure("voicelab_requests_open") - 1) < n and time.time() < end: time.sleep(.05)
        assert there >= n

    def kill(self):
        try: os.killpg(self.proc.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.proc.wait()
        self.reader.join(10)


def test_lines_metrics_and_spans(toy_home, request):
    """One line a request on the server's standard error, with disjoint stages; the metrics and the spans agree with it.
    At the stop a client that sent half a request and waits holds the server up for DRAIN_SECONDS, no longer."""
    got = []
    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
        def log_message(self, *_): pass
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    request.addfinalizer(collector.shutdown)
    server = Running(toy_home, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}", VOICELAB_DRAIN_SECONDS="1")
    request.addfinalizer(server.kill)
    trace = "0af7651916cd43dd8448eb211c80319c"
    found = server.say("/v1/search", x_voicelab_consent="transcript", x_voicelab_subject="planted-person", authorization="Bearer planted-key", traceparent=f"00-{trace}-b7ad6b7169203331-01")
    assert found.json()["text"] == SAID
    assert server.say(clip=b"no sound").status_code == 400
    assert httpx.delete(f"{server.url}/v1/subjects/planted-person", timeout=60).status_code == 200
    assert httpx.get(f"{server.url}/planted-path", timeout=60).status_code == 404
    figures = server.figures()
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(HEAD + BODY[:1000])
        server.wait_for_open(1)
        server.proc.send_signal(signal.SIGTERM)
        assert server.proc.wait(60) == 0
    server.reader.join(10)
    lines = [json.loads(l) for l in server.err]                    # every line is JSON
    stop = [l["event"] for l in lines].index("stopping")
    told = lines[:stop]
    assert {l["event"] for l in told} == {"request"}
    assert [(l["method"], l["route"], l["status"], l["code"], l["level"]) for l in told] == [
        ("POST", "/v1/search", 200, None, "info"), ("POST", "/v1/audio/transcriptions", 400, "unreadable", "warning"),
        ("DELETE", "/v1/subjects/{subject}", 200, None, "info"), ("GET", "/{name}", 404, "not_found", "warning")], told
    one = told[0]
    assert (one["request_id"], one["model"], one["logged"]) == (found.headers["x-request-id"], "voicesearch@1", "transcript") and one["bytes"] > len(CLIP) and one["audio_s"] == pytest.approx(len(toy_tones(SAID)) / 16000, abs=.01)
    assert list(one["stages_ms"]) == ["receive", "decode", "queue", "recognise", "log", "search"] and all(v > 0 for v in one["stages_ms"].values())
    assert sum(one["stages_ms"].values()) <= one["ms"] + .06
    assert [s for s in (SAID, "planted", "my-secret-name", "bearer") if s in "".join(server.err).lower()] == []
    assert [(l["event"], l["level"], l.get("left")) for l in lines[stop:] if l["event"] not in ("request", "failure")] == [("stopping", "info", None), ("drained", "warning", 1)]   # the one that was cut may say so

    value = lambda name: float(re.search(rf"^{re.escape(name)} (\S+)$", figures, re.M)[1])
    assert value('voicelab_requests_total{endpoint="/v1/search",status="200"}') == value('voicelab_rejects_total{reason="unreadable"}') == value("voicelab_batch_size_count") == value("voicelab_real_time_factor_count") == 1
    stages = {s: value(f'voicelab_stage_seconds_sum{{stage="{s}"}}') for s in ("queue", "recognise", "search")}
    assert all(abs(1000 * v - one["stages_ms"][s]) < .01 for s, v in stages.items())
    assert 0 < sum(stages.values()) < value('voicelab_request_seconds_sum{endpoint="/v1/search"}')

    spans = [s for r in got for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
    whole = next(s for s in spans if s.name == "POST /v1/search")
    inner = [s for s in spans if s.parent_span_id == whole.span_id]
    assert whole.trace_id.hex() == trace and list(dict.fromkeys(s.name for s in inner)) == list(one["stages_ms"])
    ends = [t for s in inner for t in (s.start_time_unix_nano, s.end_time_unix_nano)]
    assert ends == sorted(ends) and whole.start_time_unix_nano <= ends[0] and ends[-1] <= whole.end_time_unix_nano      # one after the other
    assert not any(w in str(got) for w in ("planted", "my-secret-name", SAID))


def test_sigterm_under_load(toy_home, monkeypatch, request):
    "Told to stop, the server finishes what it took, also a half-sent request and live speech; what comes later is refused; then it exits within its limit."
    server = Running(toy_home, VOICELAB_QUEUE="40", VOICELAB_WAIT_MS="100000", VOICELAB_DRAIN_SECONDS="100")   # on a slow machine too, no refusal but that of the stop
    request.addfinalizer(server.kill)
    stack = ExitStack()
    request.addfinalizer(stack.close)
    live = stack.enter_context(connect(server.url.replace("http", "ws") + "/vosk"))
    live.send(json.dumps(dict(config=dict(sample_rate=16000))))
    live.send((toy_tones(SAID) * 32767).astype("<i2").tobytes())
    assert list(json.loads(live.recv())) == ["partial"]
    half = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=120))
    half.sendall(HEAD + BODY[:len(BODY) // 2])                      # the stop has to wait for the rest
    server.wait_for_open(1)
    seen = threading.Event()
    def keep():                                                     # one request after another until enough were seen inside: the figures come late from a busy server
        out = []
        while not out or not seen.is_set(): out.append((server.say(clip=LONG, x_voicelab_consent="metrics"), time.time()))
        return out
    with ThreadPoolExecutor(24) as pool:
        inside = [pool.submit(keep) for _ in range(24)]
        taken, end = 0, time.time() + 60
        while time.time() < end and taken < 8: taken = server.figure("voicelab_requests_inside")
        seen.set()
        assert taken >= 8
        told = time.time()
        server.proc.send_signal(signal.SIGTERM)
        late = []
        while time.time() < end + 60 and (not late or late[-1].status_code == 200): late.append(server.say())
        lost = [f.exception() for f in inside if f.exception()]
    assert lost == [], "".join(server.err[-20:])
    assert late[-1].status_code == 503 and late[-1].json()["error"]["code"] == "stopping" and int(late[-1].headers["retry-after"]) >= 1
    assert server.say().status_code == 503                          # once it refuses, it does not take again
    answers = [r for f in inside for r, _ in f.result()]
    done = [r for r in answers if r.status_code == 200]
    assert sum(t > told and r.status_code == 200 for f in inside for r, t in f.result()) >= 4 and all(r.json()["text"].startswith(SAID) and r.headers["x-voicelab-logged"] == "metrics" for r in done)
    assert {r.json()["error"]["code"] for r in answers if r.status_code != 200} <= {"stopping"}           # these had not been taken yet
    assert "text" in json.loads(live.recv())                        # the last words, whatever a detector of speech makes of tones
    with pytest.raises(ConnectionClosed) as closed: live.recv()
    assert closed.value.rcvd.code == 1012
    assert server.proc.poll() is None
    half.sendall(BODY[len(BODY) // 2:])
    answer = b"".join(iter(lambda: half.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and SAID.encode() in answer
    assert server.proc.wait(60) == 0
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", server.port), timeout=2)
    server.reader.join(10)
    assert [l["left"] for l in map(json.loads, server.err) if l["event"] == "drained"] == [0]
    monkeypatch.setenv("VOICELAB_HOME", str(toy_home))
    assert {r.headers["x-request-id"] for r in done} <= set(RequestLog().rows().request_id)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_server_of_a_dead_program_stops(toy_home, tmp_path, request):
    "A program that had started a server, a notebook for example, is killed: the server does not stay."
    home = state_with(toy_home / "registry" / "voicesearch" / "1", tmp_path)
    program = subprocess.Popen([sys.executable, "-c", "import time\nfrom voicelab.server import server\nwith server() as url: print(url, flush=True); time.sleep(600)"],
                               stdout=subprocess.PIPE, text=True, env=dict(os.environ, VOICELAB_HOME=str(home), VOICELAB_LOG_LEVEL="off"))
    request.addfinalizer(program.kill)
    url = program.stdout.readline().strip()
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
    program.kill()
    program.wait()
    end = time.time() + 90
    while processes(home) and time.time() < end: time.sleep(.2)
    assert processes(home) == []


def test_alerts_name_real_metrics():
    "Every metric of the alerting rules in examples/ is one that the server has."
    import yaml
    from voicelab.serve import Metrics
    metrics = Metrics()
    names = {m.name + end for m in metrics.registry.collect() for end in ("", "_total", "_bucket", "_sum", "_count")} | {"up"}
    rules = yaml.safe_load((Path(__file__).parent.parent / "examples" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len({r["alert"] for r in rules}) == len(rules) >= 6 and all(r["annotations"]["summary"] for r in rules)
    used = {n for r in rules for n in re.findall(r"\b(?:voicelab_\w+|up)\b(?=[{\[ ])", r["expr"])}
    assert used <= names and len(used) >= 6, used - names
