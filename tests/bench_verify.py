"""What verification finds in copies of AN4 that are read wrongly, and what it says of the true clips. Into reports/benchmarks/verify.json.

    python tests/bench_verify.py

All clips of AN4's train and dev, all of FSDD and the young and the other test voices of the default corpus as they are: none may be an error. All of AN4's train and dev in thirteen wrong ways, whole copies as a careless conversion makes them; a row is caught when it is an error. At a wrong rate a recogniser is asked (the base model, as `voicelab data verify` does), which has heard AN4's training speakers:
so the dev speakers stand alone too, where there are enough clips for a verdict.
"""
import io, os, platform, sys, tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from joblib import Parallel, delayed

from voicelab.audio import read_audio
from voicelab.core import git_commit, home, setting, utc_now, write_json
from voicelab.importers import import_corpus
from voicelab.speed import played_too_fast
from voicelab.synth import BASE, make_voicesearch
from voicelab.verify import verify

OUT = Path(__file__).parent.parent / "reports" / "benchmarks" / "verify.json"


def law(x, subtype, rate=8000) -> bytes:
    "Samples as a telephone exchange encodes them."
    out = io.BytesIO()
    sf.write(out, x, rate, format="RAW", subtype=subtype)
    return out.getvalue()


def labelled(true, label):
    "A recording at one rate with the header of another."
    return lambda x: (soxr.resample(x, 16000, true) if true != 16000 else x, label, "PCM_16")


def words(data: bytes): return np.frombuffer(data[:len(data) // 2 * 2], "<i2")
def pcm(x): return np.round(x * 32768).clip(-32768, 32767).astype("<i2")

DAMAGE = {
    "byte-swapped": lambda x: (pcm(x).byteswap(), 16000, "PCM_16"),
    "a byte later": lambda x: (words(pcm(x).tobytes()[1:]), 16000, "PCM_16"),
    "A-law read as 16-bit PCM": lambda x: (words(law(x, "ALAW")), 16000, "PCM_16"),
    "mu-law read as 16-bit PCM": lambda x: (words(law(x, "ULAW")), 16000, "PCM_16"),
    "A-law read as 8-bit PCM": lambda x: ((np.frombuffer(law(x, "ALAW"), np.uint8).astype(np.int16) - 128) * 256, 16000, "PCM_U8"),
    "8 kHz labelled 16": labelled(8000, 16000), "16 kHz labelled 8": labelled(16000, 8000),
    "44.1 kHz labelled 16": labelled(44100, 16000), "16 kHz labelled 44.1": labelled(16000, 44100),
    "16 kHz labelled 24": labelled(16000, 24000), "11.025 kHz labelled 16": labelled(11025, 16000), "22.05 kHz labelled 16": labelled(22050, 16000), "16 kHz labelled 22.05": labelled(16000, 22050)}


def damaged(how, path, to):
    "A clip with one fault, as a file; its duration by the header."
    y, rate, subtype = DAMAGE[how](read_audio(path))
    sf.write(to, y, rate, subtype=subtype)
    return sf.info(to).duration


def said(df, problems):
    "Rows by severity and problem."
    return dict(clips=len(df), errors=int(problems.row[problems.severity == "error"].nunique()), warnings=int(problems.row[problems.severity == "warning"].nunique()), problems={k: int(n) for k, n in problems.problem.value_counts().items()})


def main():
    an4, rows = import_corpus("an4").query("split != 'test'").reset_index(drop=True), {}
    rows["AN4 train and dev as it is"] = said(an4, verify(an4, ear=played_too_fast))
    print(rows, flush=True)
    fsdd = import_corpus("fsdd")
    rows["FSDD as it is"] = said(fsdd, p := verify(fsdd, shared_speakers=True, ear=played_too_fast))
    rows["FSDD as it is"]["named"] = p[p.problem != "speaker_in_two_splits"][["utterance_id", "problem", "detail"]].to_dict("records")
    print(rows["FSDD as it is"], flush=True)
    synth = make_voicesearch(home("corpora", "base"), BASE, seed=0).query("split == 'test'")
    for age, some in (("young", synth[synth.age == "youth"]), ("adult and old", synth[synth.age != "youth"])):
        rows[f"{age} test voices of the default corpus as they are"] = said(some, verify(some, ear=played_too_fast))
    for how in DAMAGE:
        with tempfile.TemporaryDirectory() as tmp:
            files = [f"{tmp}/{i}.wav" for i in range(len(an4))]
            seconds = Parallel(setting("THREADS"))(delayed(damaged)(how, p, f) for p, f in zip(an4.audio_filepath, files))
            bad = an4.assign(audio_filepath=files, duration=seconds)
            rows[how] = said(bad, verify(bad, ear=played_too_fast))
            if "label" in how:
                dev = bad[bad.split == "dev"].reset_index(drop=True)
                rows[how] |= dict(dev_speakers_alone=said(dev, verify(dev, ear=played_too_fast)))
            print(how, rows[how], flush=True)
    write_json(OUT, dict(rows=rows, measured_by=f"python {' '.join(['tests/bench_verify.py', *sys.argv[1:]])}", commit=git_commit(), date=utc_now(), machine=f"{platform.machine()}, {os.cpu_count()} cores"))


if __name__ == "__main__": main()
