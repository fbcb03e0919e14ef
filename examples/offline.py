"""Transcribe on one core without a network, as a phone or a small board would.

    python examples/offline.py BUNDLE FILE...

BUNDLE is a folder with an exported model, for example reports/benchmarks/an4/model. Needs what requirements-serve.lock holds; no PyTorch.
"""
import os, sys, time

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])                     # one core, whatever the machine has
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[name] = "1"

from voicelab.audio import read_audio
from voicelab.core import InputError
from voicelab.recognizer import Recognizer


def main(bundle, *files):
    recognizer, heard, spent = Recognizer(bundle), 0.0, 0.0
    for file in files:
        samples, start = read_audio(file), time.perf_counter()
        result = recognizer.transcribe([samples])[0]
        spent, heard = spent + time.perf_counter() - start, heard + len(samples) / 16000
        print(f"{file}: {result['text']}  ({result['confidence']:.0%})")
    peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024      # getrusage would count what the starting process held
    print(f"{heard:.1f} s of audio in {spent:.2f} s on one core: {heard / spent:.0f} times real time; peak memory {peak:.0f} MB; PyTorch {'was' if 'torch' in sys.modules else 'not'} imported", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 3: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except (InputError, FileNotFoundError) as e: sys.exit(f"error: {e}")
