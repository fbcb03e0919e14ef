"""Load on the served application, beside the same recogniser in process and behind plain FastAPI and uvicorn. Into reports/benchmarks/serve.json.

Clips of 3 s. Locust (from pip, in an environment of its own) is the load generator: closed loop with 1, 4, 16 and 64 clients, then an open one at half of the
throughput that was found. It has the same cores as what it measures, so all ratios are of runs in turns; its own CPU time is not counted as the server's.
The recogniser in process has all cores, the server what the load generator leaves: `ratio_in_process` is the plain ratio of requests/s, `ratio_in_process_fair` the same per core that was left.
CPU time beyond the recogniser's own is told twice: `overhead_core_ms` takes off what a clip costs in process, one after another without a pause; `beside_recogniser_ms` what the recogniser's two threads used there and then, beside a load generator and with pauses, in which the same work costs more.
Then an open loop at four times the throughput that was found: what is answered, how soon, with how much memory, and whether all is well five seconds later;
a new champion and the old one again under load; and the uploads that mean harm of `test_faults.py`, how many took how long and how much memory.

    python tests/bench_serve.py [--seconds 12] [--rounds 2] [--overload 60] [--hostile 2000] [--hour]
"""
import argparse, json, os, platform, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import soundfile as sf
from test_faults import hostile

from voicelab.audio import read_audio, wav_bytes
from voicelab.core import free_port, git_commit, package_path, utc_now, write_json
from voicelab.export import export_bundle
from voicelab.importers import import_corpus
from voicelab.model import load_model
from voicelab.recognizer import Recognizer
from voicelab.registry import Registry
from voicelab.scope import Scope
from voicelab.server import server

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "serve.json"
LIVE = OUT.with_name("live.json")
LOCUST = "locust==2.43.0"
CLIENTS = (1, 4, 16, 64)
LOADS = """
import itertools, json, os, time
from pathlib import Path
from locust import FastHttpUser, constant_throughput, events, task
said = []
@events.request.add_listener
def note(response_time, response, **more): said.append((response.status_code, response_time, bool(response.headers and response.headers.get("retry-after"))))
began = []
@events.test_start.add_listener
def begin(**more): began[:] = [time.process_time(), time.perf_counter()]
@events.test_stop.add_listener
def end(**more): began[:] = [(time.process_time() - began[0]) / (time.perf_counter() - began[1])]
@events.quitting.add_listener
def keep(**more): Path(os.environ["SAID"]).write_text(json.dumps(dict(said=said, cores=began[0])))
clips, turn = [p.read_bytes() for p in sorted(Path(os.environ["CLIPS"]).glob("*.wav"))], itertools.count()
HEAD, TAIL = b'--x\\r\\nContent-Disposition: form-data; name="file"; filename="a.wav"\\r\\nContent-Type: audio/wav\\r\\n\\r\\n', b"\\r\\n--x--\\r\\n"
class App(FastHttpUser):
    if os.environ.get("PACE"): wait_time = constant_throughput(float(os.environ["PACE"]))
    @task
    def ask(self): self.client.post("/v1/audio/transcriptions", data=HEAD + clips[next(turn) % len(clips)] + TAIL, headers={"Content-Type": "multipart/form-data; boundary=x"})
"""
PLAIN = """
import asyncio, sys, uvicorn
from concurrent.futures import ThreadPoolExecutor
from fastapi import FastAPI, UploadFile
from voicelab.audio import decode_audio
from voicelab.recognizer import Recognizer
from voicelab.serve import Batcher
r, app, threads = Recognizer(sys.argv[1], threads=2), FastAPI(), ThreadPoolExecutor(4)
batcher = Batcher(lambda items: r.transcribe(items), 8, .008)
@app.post("/v1/audio/transcriptions")
async def transcribe(file: UploadFile):
    samples = await asyncio.get_running_loop().run_in_executor(threads, lambda data: decode_audio(data)[0], await file.read())
    return dict(text=(await batcher.submit(samples))["text"])
@app.get("/readyz")
async def ready(): return {}
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


def used(pid):
    "CPU seconds and resident megabytes of a process and its descendants."
    cpu = mb = 0.
    for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.Error): cpu, mb = cpu + sum(p.cpu_times()[:2]), mb + p.memory_info().rss / 2**20
    return cpu, mb


def by_thread(pid):
    "CPU seconds of each thread of the process that recognises: Ray's replica, or the plain application itself."
    every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    holder = next((p for p in every if "ServeReplica" in " ".join(p.cmdline())), every[0])
    return {t.id: t.user_time + t.system_time for t in holder.threads()}


def load(url, clients, seconds, folder, pace=None):
    "What Locust measured: requests/s, failures, percentiles in ms; the cores that it took itself. `answers` has status, milliseconds and Retry-After of each."
    (folder / "loads.py").write_text(LOADS)
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run([str(uv), "run", "-q", "--no-project", "--python", sys.executable, "--with", LOCUST, "locust", "-f", str(folder / "loads.py"), "--headless", "-H", url, "-u", str(clients), "-r", str(clients),
                           "-t", f"{seconds}s", "--csv", str(folder / "out"), "--only-summary", "--stop-timeout", "10"],
                          capture_output=True, text=True, env=dict(os.environ, CLIPS=str(folder / "clips"), SAID=str(folder / "said.json"), PACE=str(pace / clients) if pace else ""))
    if not (folder / "out_stats.csv").is_file(): raise SystemExit(f"locust failed: {done.stderr[-800:]}")
    r = pd.read_csv(folder / "out_stats.csv").iloc[-1]
    return dict(requests=int(r["Request Count"]), failures=int(r["Failure Count"]), per_s=float(r["Requests/s"]), p50=float(r["50%"]), p95=float(r["95%"]), p99=float(r["99%"]), generator_cores=json.loads((folder / "said.json").read_text())["cores"])


def answers(folder):
    "What was answered to the latest load: [status, milliseconds, with Retry-After?]."
    return json.loads((folder / "said.json").read_text())["said"]


@contextmanager
def plain(bundle):
    "The same recogniser and batches behind plain FastAPI."
    port = free_port()
    proc = subprocess.Popen([sys.executable, "-c", PLAIN, str(bundle), str(port)])
    try:
        for _ in range(100):
            try: httpx.get(f"http://127.0.0.1:{port}/readyz"); break
            except httpx.HTTPError: time.sleep(.2)
        else: raise SystemExit("the plain application did not start within 20 s")
        yield f"http://127.0.0.1:{port}", proc.pid
    finally:
        proc.terminate()
        proc.wait()


@contextmanager
def ours(home, **env):
    "The served application, with its usual settings but for what is given."
    with server(env=dict(VOICELAB_HOME=str(home), VOICELAB_LOG_LEVEL="warning", **env)) as url:
        yield url, next(p.pid for p in psutil.Process().children() if any("run_server" in c for c in p.cmdline()))


def in_process(bundle, clips, clients, seconds):
    "Requests/s and CPU seconds a clip of the recogniser alone, in batches of as many clips as there are clients, 8 at most."
    r, n, size = Recognizer(bundle, threads=2), 0, min(clients, 8)
    r.transcribe(clips[:size])
    times, cpu, start = [], time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        r.transcribe([clips[(n + i) % len(clips)] for i in range(size)])
        times.append(time.perf_counter() - t)
        n += size
    return dict(per_s=n / (time.perf_counter() - start), cpu_ms=1000 * (time.process_time() - cpu) / n, p50=1000 * np.median(times), p95=1000 * np.quantile(times, .95))


def overload(url, pid, folder, capacity, seconds):
    "Four times as many requests as can be answered, for a while; then five seconds of rest and one client."
    load(url, 1, 5, folder)
    calm, mb, done = answers(folder), [used(pid)[1]], threading.Event()
    def watch():
        while not done.wait(1): mb.append(used(pid)[1])
    watcher = threading.Thread(target=watch)
    watcher.start()
    r = load(url, 256, seconds, folder, 4 * capacity)
    done.set()
    watcher.join()
    t = pd.DataFrame(answers(folder), columns=["status", "ms", "retry_after"])
    time.sleep(5)
    load(url, 1, 5, folder)
    after = answers(folder)
    good = t[t.status == 200]
    return dict(asked_per_s=round(4 * capacity, 1), sent_per_s=r["per_s"], seconds=seconds, statuses={str(k): int(v) for k, v in t.status.value_counts().items()},
                without_retry_after=int((t.status.isin([429, 503]) & ~t.retry_after).sum()), accepted_per_s=round(len(good) / seconds, 1), accepted_p50_ms=float(good.ms.median()), p95_ms=float(good.ms.quantile(.95)), other_statuses=int((~t.status.isin([200, 429, 503])).sum()),
                refused_p95_ms=float(t[t.status != 200].ms.quantile(.95)), limit_ms=Scope().targets["latency_p95_ms"], mb_before=mb[0], mb_middle=mb[len(mb) // 2], mb_most=max(mb), mb_end=mb[-1],
                calm_p95_ms=float(np.quantile([x[1] for x in calm], .95)), after_p95_ms=float(np.quantile([x[1] for x in after], .95)), after_not_200=sum(x[0] != 200 for x in after),
                recovered_s=5 if all(x[0] == 200 for x in after) and np.quantile([x[1] for x in after], .95) <= 1.5 * np.quantile([x[1] for x in calm], .95) else None)


def swaps(url, folder, registry, clip):
    "Requests that failed while four clients asked and the champion changed twice; and how often it was seen to change."
    said, done = [], threading.Event()
    def ask():
        with httpx.Client(base_url=url, timeout=60) as c:
            while not done.is_set():
                try: r = c.post("/v1/audio/transcriptions", files=dict(file=clip))
                except httpx.HTTPError: said.append((0, None))
                else: said.append((r.status_code, r.headers.get("x-voicelab-model")))
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for c in clients: c.start()
    for change in (lambda: registry.promote("voicesearch", registry.register("voicesearch", folder / "bundle"), "bench", "swap"), lambda: registry.rollback("voicesearch", "bench", "back again")):
        time.sleep(3)
        change()
        time.sleep(6)
    done.set()
    for c in clients: c.join()
    models = [m for _, m in said if m]
    return dict(requests=len(said), failed=sum(s != 200 for s, _ in said), changes=sum(a != b for a, b in zip(models, models[1:])), models=sorted(set(models)))


def harm(url, pid, n):
    "Uploads that are broken, lie or mean harm: those with a 5xx, those of more than 25 s, megabytes more afterwards."
    def one(i):
        body, kind, _ = hostile(np.random.default_rng(i))
        start = time.perf_counter()
        try: status = httpx.post(url + "/v1/audio/transcriptions", content=body, headers={"content-type": kind}, timeout=60).status_code
        except httpx.HTTPError: status = 599                                   # no answer is as bad
        return start, status, time.perf_counter()
    for i in range(50): one(i)
    before = used(pid)[1]
    with ThreadPoolExecutor(4) as pool: said = list(pool.map(one, range(n)))
    return {"tried": n, "5xx": sum(s >= 500 for _, s, _ in said), "hung": sum(b - a > 25 for a, _, b in said), "growth_mb": round(used(pid)[1] - before, 1), "longest_s": round(max(b - a for a, _, b in said), 2)}


def hour(url, pid, folder, clips):
    "An hour of speech in one file: how soon the first words and the last came, and how many megabytes it took at most."
    pause, parts, n = np.zeros(12000, np.float32), [], 0
    while n < 3600 * 16000:
        parts += [clips[len(parts) // 2 % len(clips)], pause]
        n += len(parts[-2]) + len(pause)
    with sf.SoundFile(folder / "hour.ogg", "w", 16000, 1, format="OGG", subtype="VORBIS") as f:
        for p in parts: f.write(p)                                             # libsndfile's encoder does not take an hour at once
    mb, done = [used(pid)[1]], threading.Event()
    def watch():
        while not done.wait(.5): mb.append(used(pid)[1])
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, first, words, last = time.perf_counter(), None, 0, ""
    with httpx.stream("POST", url + "/v1/audio/transcriptions", files=dict(file=("hour.ogg", (folder / "hour.ogg").read_bytes())), data=dict(stream="true"), timeout=1800) as r:
        for line in r.iter_lines():
            if '"transcript.text.delta"' in line: first, words = first or time.perf_counter() - start, words + len(json.loads(line[6:])["delta"].split())
            if line: last = line
    done.set()
    watcher.join()
    return dict(seconds=round(n / 16000), file_mb=round((folder / "hour.ogg").stat().st_size / 2**20, 1), status=r.status_code, finished='"transcript.text.done"' in last, words=words, first_words_s=round(first, 2), all_s=round(time.perf_counter() - start, 1), growth_mb=round(max(mb) - mb[0], 1))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seconds", type=int, default=12)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--overload", type=int, default=60, metavar="SECONDS")
    p.add_argument("--hour", action="store_true", help="transcribe an hour of audio, too")
    p.add_argument("--hostile", type=int, default=2000, metavar="UPLOADS")
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        bundle = export_bundle(load_model(package_path("base")), tmp / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz")
        registry = Registry(tmp / "registry")
        registry.promote("voicesearch", registry.register("voicesearch", bundle), "bench", "bench")
        speech = [read_audio(f) for f in import_corpus("an4").query("split == 'dev' and duration >= 3").audio_filepath.head(24)]
        clips = [x[:48000] for x in speech]
        (tmp / "clips").mkdir()
        for i, x in enumerate(clips): (tmp / "clips" / f"{i:02}.wav").write_bytes(wav_bytes(x))
        for n in range(a.rounds):
            for clients in CLIENTS: rows.append(dict(what="in process", round=n, clients=clients) | in_process(bundle, clips, clients, a.seconds / 2))
            with plain(bundle) as (url, pid): rows += measured("fastapi", n, url, pid, tmp, a.seconds)
            with ours(tmp, VOICELAB_QUEUE="64", VOICELAB_WAIT_MS="10000") as (url, pid): rows += measured("voicelab", n, url, pid, tmp, a.seconds)
        t = pd.DataFrame(rows)
        with ours(tmp) as (url, pid):
            too_much = overload(url, pid, tmp, t[(t.what == "voicelab") & t.pace.isna()].per_s.max(), a.overload)
            long = hour(url, pid, tmp, speech) if a.hour else None
            swapped, harmed = swaps(url, tmp, registry, (tmp / "clips" / "00.wav").read_bytes()), harm(url, pid, a.hostile)
    print(t.round(1).to_string())
    closed = t[t.clients.isin(CLIENTS) & t.pace.isna()]
    speed = closed.pivot_table(index=["round", "clients"], columns="what", values="per_s")
    own = closed[closed.what == "in process"].groupby("clients").cpu_ms.mean()
    extra = closed[closed.what == "voicelab"].groupby("clients").cpu_ms.mean() - own
    mine = closed[closed.what == "voicelab"]
    taken = mine.groupby("clients").generator_cores.mean()
    left = 1 - taken / np.minimum(taken.index, os.cpu_count() or 1)       # what the load generator leaves: of all cores, or, where one client waits for each answer, of the time
    fair = (speed.voicelab / speed["in process"]).groupby("clients").mean() / left
    beside = (mine.cpu_ms - mine.recogniser_cpu_ms).groupby(mine.clients).mean()
    alone = closed[closed.clients == 1].groupby("what").p95.mean()
    served = closed[closed.what == "voicelab"].groupby("clients")[["per_s", "p50", "p95", "p99"]].mean().round(1).rename(columns=dict(per_s="rps", p50="p50_ms", p95="p95_ms", p99="p99_ms"))
    live = json.loads(LIVE.read_text()) if LIVE.is_file() else None
    said = dict(clients=served.to_dict("index"), ratio_in_process=(speed.voicelab / speed["in process"]).groupby("clients").mean().round(3).to_dict(), ratio_in_process_fair=fair.round(3).to_dict(), ratio_fastapi=(speed.voicelab / speed.fastapi).groupby("clients").mean().round(3).to_dict(),
                overhead_core_ms=extra.round(2).to_dict(), beside_recogniser_ms=beside.round(2).to_dict(), failures=int(closed.failures.sum()), p95_alone_ms=float(alone["voicelab"]), p95_allowed_ms=float(1.5 * alone["in process"] + 10), unloaded_p95_excess_ms=float(alone["voicelab"] - 1.5 * alone["in process"]),
                overload=too_much, swap_failed=swapped["failed"], swap=swapped, hostile=harmed, hour=long,
                stream=live and dict(first_partial_p95_ms={k: live[k]["first_words_ms"]["p95"] for k in ("realtime", "vosk")}, final_p95_ms=live["realtime"]["final_after_end_ms"]["p95"], commit=live["commit"]))
    print(json.dumps(said, indent=1))
    write_json(OUT, dict(said, table=json.loads(t.to_json(orient="records")), command=f"python {' '.join(['tests/bench_serve.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


def measured(what, n, url, pid, folder, seconds):
    "Closed loops with more and more clients, then an open one at half of the best throughput."
    load(url, 4, 4, folder)                                                                # warm
    rows = []
    def one(clients, pace=None):
        before, threads = used(pid), by_thread(pid)
        r = load(url, clients, seconds, folder, pace)
        after = used(pid)
        busy = sorted(v - threads.get(k, 0) for k, v in by_thread(pid).items())                # the recogniser's two threads are the busiest by far: the one that batches, and ONNX Runtime's own
        each = 1000 / max(r["requests"], 1)
        rows.append(dict(what=what, round=n, clients=clients, pace=pace) | r | dict(cpu_ms=each * (after[0] - before[0]), recogniser_cpu_ms=each * sum(busy[-2:]), third_thread_cpu_ms=each * busy[-3], mb=after[1]))
        print(rows[-1], flush=True)
    for clients in CLIENTS: one(clients)
    one(16, .5 * max(r["per_s"] for r in rows))
    return rows


if __name__ == "__main__": main()
