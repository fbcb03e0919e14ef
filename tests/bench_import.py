"""How long `voicelab data import` takes for ten thousand short clips, in total and by part. Into reports/benchmarks/import.json.

    python tests/bench_import.py [--clips 10000]

The clips (0.5 to 2 s of toy speech, 16-bit WAV at 16 kHz, a manifest beside them) are made once in a temporary folder and are not in the time. Every clip is decoded, measured in all ways that verification knows,
compared with all others, hashed and stored. As many processes as the setting THREADS says; `cores` is what this process was allowed to use.
"""
import argparse, contextlib, io, json, os, platform, sys, tempfile, time
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from voicelab import cli, importers, manifest, verify
from voicelab.audio import SAMPLE_RATE, toy_speech, write_wav
from voicelab.core import git_commit, setting, utc_now, write_json, write_jsonl
from voicelab.distort import speed

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "import.json"
WORDS = "zero one two three four five six seven eight nine north south east west hotel street river garden".split()


def make(folder: Path, i: int, n: int) -> list:
    "Ten voices' clips out of one: played at ten speeds, cut at other places, so that no two are copies."
    rng, x, rows = np.random.default_rng(i), toy_speech(3.2, seed=i, pitch=90 + 20 * (i % 9)), []
    for k in range(n):
        y = speed(x, .8 + .045 * k)
        size = int(rng.uniform(.5, 2) * SAMPLE_RATE)
        start = int(rng.integers(2400, len(y) - size))
        y = y[start:start + size] * rng.uniform(.5, 1.5)
        name = f"{i:05d}-{k}"
        write_wav(folder / f"{name}.wav", y)
        rows.append(dict(audio_filepath=f"{name}.wav", text=" ".join(rng.choice(WORDS, max(1, round(size / SAMPLE_RATE * 2)))), speaker=f"s{i}", utterance_id=name, split="train"))
    return rows


@contextlib.contextmanager
def timed(parts: dict, module, name: str, label: str):
    "Add up what a function of a module takes."
    def f(*args, **kw):
        start = time.perf_counter()
        try: return before(*args, **kw)
        finally: parts[label] = parts.get(label, 0) + time.perf_counter() - start
    before = getattr(module, name)
    setattr(module, name, f)
    try: yield
    finally: setattr(module, name, before)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--clips", type=int, default=10000)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["VOICELAB_HOME"] = f"{tmp}/home"
        made = Parallel(setting("THREADS"))(delayed(make)(Path(tmp) / "clips", i, min(10, a.clips - 10 * i)) for i in range(-(-a.clips // 10)))
        rows, parts, said, heard = [r for m in made for r in m], {}, io.StringIO(), io.StringIO()
        source = write_jsonl(Path(tmp) / "clips" / "manifest.jsonl", rows)
        wall, cpu = time.perf_counter(), os.times()
        with contextlib.ExitStack() as stack:
            for module, name, label in ((importers, "import_corpus", "read the manifest"), (verify, "inspect", "listen"), (verify, "near_duplicates", "near-duplicates"), (verify, "verify", "verify"), (manifest, "write_version", "store")):
                stack.enter_context(timed(parts, module, name, label))
            stack.enter_context(contextlib.redirect_stderr(heard))
            stack.enter_context(contextlib.redirect_stdout(said))
            code = cli.main(["data", "import", str(source), "--name", "bench", "--on-error", "quarantine"])
        wall, used = time.perf_counter() - wall, sum(os.times()[:4]) - sum(cpu[:4])
        if code: sys.exit(heard.getvalue()[-2000:])
        parts["other checks"] = parts.pop("verify") - parts["listen"] - parts["near-duplicates"]
        aside = sum(1 for line in heard.getvalue().splitlines() if line.startswith(("warning", "error")))
        out = dict(clips=len(rows), hours=round(sum((Path(tmp) / "clips" / r["audio_filepath"]).stat().st_size - 44 for r in rows) / 32000 / 3600, 3), seconds=round(wall, 1), parts={k: round(v, 1) for k, v in parts.items()},
                   clips_a_second=round(len(rows) / wall), cpu_seconds=round(used, 1), cores=len(os.sched_getaffinity(0)), processes=setting("THREADS"), load=os.getloadavg()[0], findings=aside)
    print(json.dumps(out, indent=1))
    write_json(OUT, out | dict(measured_by=f"python {' '.join(['tests/bench_import.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
