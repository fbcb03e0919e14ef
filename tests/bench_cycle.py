"""What a newcomer waits for, from a clean checkout: installation, first served transcript, the second time, the tests. Into reports/benchmarks/cycle.json.

    python tests/bench_cycle.py [--only install first second test]
"""
import argparse, json, os, platform, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path

import httpx, psutil

ROOT = Path(__file__).parent.parent
OUT = ROOT / "reports" / "benchmarks" / "cycle.json"


class Peak(threading.Thread):
    "The largest sum of proportional memory of a process and its children, in MB. Looked at now and then: the kernel stops a process to add its pages up."
    def __init__(self, pid): super().__init__(daemon=True); self.pid, self.mb, self.stop = pid, 0.0, threading.Event()
    def run(self):
        while not self.stop.wait(10):
            try: family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
            except psutil.Error: return
            total = 0
            for p in family:
                try: total += p.memory_full_info().pss
                except psutil.Error: pass
            self.mb = max(self.mb, total / 1e6)


def timed(command, folder, until=None):
    "Seconds until the command ends (or `until()` holds, then it is stopped) and its peak memory."
    start = time.time()
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    peak = Peak(process.pid); peak.start()
    while process.poll() is None and not (until and until()): time.sleep(.5)
    seconds = time.time() - start
    peak.stop.set()
    if until and process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    elif process.returncode: raise SystemExit(f"{command} ended with {process.returncode} after {seconds:.0f} s")
    return seconds, peak.mb


def served(clip):
    "Does the application answer with a transcript?"
    def check():
        with socket.socket() as s:                       # a client of httpx costs 20 ms to make
            if s.connect_ex(("127.0.0.1", 8000)): return False
        try: return httpx.post("http://127.0.0.1:8000/v1/audio/transcriptions", files=dict(file=("a.wav", clip)), timeout=10).status_code == 200
        except httpx.HTTPError: return False
    return check


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--only", nargs="*", default=["install", "first", "second", "test"])
    p.add_argument("--folder", help="keep the clone there, or go on with the one that is there: a second run finds the environment as the first left it")
    a = p.parse_args()
    from voicelab.audio import toy_speech, wav_bytes
    clip = wav_bytes(toy_speech(2.0))
    folder = Path(a.folder or tempfile.mkdtemp()) / "voicelab"
    if not folder.is_dir(): subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    result, peaks = json.loads(OUT.read_text()) if OUT.exists() else {}, []
    install, mb = timed(["make", "-s", "setup"], folder)
    if "install" in a.only: result["install_s"] = round(install)
    for name in ("first", "second"):
        if name not in a.only: continue
        for junk in ("var", "reports"): shutil.rmtree(folder / junk, ignore_errors=True)
        seconds, mb = timed(["make", "-s", "run"], folder, until=served(clip))
        result[f"{name}_run_s"] = round(seconds + (install if name == "first" else 0))
        peaks.append(mb)
        result["voicesearch_quick_wer"] = json.loads((folder / "reports" / "voicesearch-quick" / "4_errors.json").read_text())["metrics"]["wer"]
    if "test" in a.only:
        seconds, mb = timed(["make", "-s", "test"], folder)
        result["test_s"] = round(seconds)
        peaks.append(mb)
    quality = ROOT / "reports" / "benchmarks" / "quality.json"
    if quality.exists(): result |= {f"{k}_wer": json.loads(quality.read_text())[k]["wer"] for k in ("voicesearch", "an4") if k in json.loads(quality.read_text())}
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result |= dict(peak_mb=round(max(peaks + [result.get("peak_mb", 0)])), commit=commit, command=f"python tests/bench_cycle.py {' '.join(sys.argv[1:])}".strip(),
                   machine=f"{platform.machine()}, {os.cpu_count()} cores", date=time.strftime("%Y-%m-%d"))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__": main()
