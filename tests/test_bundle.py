"What a notebook cell cannot test of bundles and the registry: a trained model in other runtimes, processes that race, crash or are cut off."
import multiprocessing as mp
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from voicelab.audio import read_audio, write_wav
from voicelab.core import InputError, package_path, read_json, setting, write_json
from voicelab.evaluate import wer
from voicelab.export import check_bundle, export_bundle, sherpa_texts, toy_bundle, toy_tones
from voicelab.recognizer import Recognizer, load_recognizer
from voicelab.registry import Registry

TEXTS = ["cab", "bead", "a bad face", "head", "add", "deaf cafe", "hedge", "bag"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small real model that has learnt eight clips of tones by heart, so that its transcripts have words to compare."
    import torch
    from voicelab.features import fbank
    from voicelab.model import CTCModel, ModelConfig
    from voicelab.text import encode
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    clips = [toy_tones(t) + rng.normal(0, .001, len(toy_tones(t))).astype(np.float32) for t in TEXTS]
    feats = [torch.from_numpy(fbank(c)) for c in clips]
    x, lens = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), torch.tensor([len(f) for f in feats])
    target = [torch.tensor(encode(t)) for t in TEXTS]
    model = CTCModel(ModelConfig(channels=8, dim=64, layers=1, dropout=0.))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(400):
        lp, n = model(x, lens)
        loss = torch.nn.functional.ctc_loss(lp.transpose(0, 1), torch.cat(target), n, torch.tensor([len(t) for t in target]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < .005: break
    df = pd.DataFrame(dict(audio_filepath=[str(write_wav(folder/f"{i}.wav", c)) for i, c in enumerate(clips)], text=TEXTS))
    return model.eval(), df, export_bundle(model, folder/"bundle", dict(name="tones"), golden=df.head(3))


def test_trained_bundle_passes_every_check(trained):
    model, df, bundle = trained
    checks = check_bundle(bundle, model, df)
    assert checks.ok.all(), checks.to_string()
    for precision in ("float32", "int8"):
        r = Recognizer(bundle, precision)
        assert [x["text"] for x in r.transcribe([read_audio(p) for p in df.audio_filepath])] == TEXTS
        assert r.check_golden()["ok"]


def test_padding_and_company_do_not_change_float_answers(trained):
    _, df, bundle = trained
    rng = np.random.default_rng(1)
    r = Recognizer(bundle)
    clips = [rng.normal(0, .05, rng.integers(1600, 60000)).astype(np.float32) for _ in range(24)]
    together = r.log_probs(clips)
    for c, lp in zip(clips, together): assert np.abs(r.log_probs([c])[0] - lp).max() < 1e-3


def test_sherpa_death_is_one_clear_error(trained, tmp_path):
    _, df, bundle = trained
    broken = tmp_path/"broken"
    shutil.copytree(bundle, broken)
    (broken/"model.onnx").write_bytes((broken/"model.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match="sherpa_onnx did not read"): sherpa_texts(broken, [toy_tones("cab")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The shipped base model, its bundle, and 40 clips of test voices that it has not heard."
    if not (package_path("base")/"model.pt").is_file(): pytest.skip("no base model in this checkout")
    from voicelab.model import load_model
    from voicelab.synth import make_voicesearch
    folder = tmp_path_factory.mktemp("base")
    df = make_voicesearch(folder/"clips", dict(test=40), seed=7).query("split == 'test'").reset_index(drop=True)
    model = load_model(package_path("base"))
    return model, export_bundle(model, folder/"bundle", dict(name="base"), golden=df.head(3), lm=package_path("base")/"lm.npz"), df


def test_base_bundle_passes_every_check(base):
    model, bundle, df = base
    checks = check_bundle(bundle, model, df)
    assert checks.ok.all(), checks.to_string()
    assert Recognizer(bundle).check_golden()["ok"]


def test_base_bundle_behaves(base):
    "Half as loud: the same words but for a few. Silence: none. Steady noise: next to none."
    _, bundle, df = base
    r = Recognizer(bundle)
    clips = [read_audio(p) for p in df.audio_filepath]
    hyps = [x["text"] for x in r.transcribe(clips)]
    assert wer(df.text, hyps) < .15
    assert wer([h or "-" for h in hyps], [x["text"] for x in r.transcribe([.5*c for c in clips])]) < .04
    assert r.transcribe([np.zeros(32000, np.float32)])[0]["text"] == ""
    noise = r.transcribe([(10**(-d/20)*np.random.default_rng(d).standard_normal(48000)).astype(np.float32) for d in range(20, 60, 4)])
    assert np.mean([len(x["words"]) for x in noise]) <= 1


@pytest.fixture(scope="module")
def late(base):
    "What is heard of the clips, and of the same clips after 0.8 s of silence."
    _, bundle, df = base
    r = Recognizer(bundle)
    clips = [read_audio(p) for p in df.audio_filepath]
    return r.transcribe(clips), r.transcribe([np.r_[.001*np.random.default_rng(0).standard_normal(12800), c].astype(np.float32) for c in clips])


def delays(late, pick):
    "How much later the words are heard, of those that are heard twice."
    return [b["start"] - a["start"] for x, y in zip(*late) for a, b in zip(pick(x["words"]), pick(y["words"])) if a["word"] == b["word"]]


def test_base_bundle_hears_the_same_after_a_silence(late):
    "0.8 s later: the same words but for a few, and all of them 0.8 s later, the first one too."
    assert wer([x["text"] or "-" for x in late[0]], [x["text"] for x in late[1]]) < .1
    assert abs(np.median(delays(late, lambda words: words[:1])) - .8) < .05
    assert abs(np.median(delays(late, lambda words: words[1:])) - .8) < .05


def test_policy_of_a_model_is_applied(base, late, tmp_path):
    "The same bundle with an audio policy: clips far too soft, off centre and between two seconds of hiss are cut and brought to one level; words come at the times that they have in the whole clip; a live utterance, cut already, is not cut again."
    _, bundle, df = base
    shutil.copytree(bundle, tmp_path / "bundle")
    write_json(tmp_path / "bundle" / "config.json", read_json(bundle / "config.json") | dict(policy=dict(level=True, trim=True)))
    r, hiss = Recognizer(tmp_path / "bundle"), .0005 * np.random.default_rng(0).standard_normal(32000)
    assert Recognizer(bundle).policy is None and r.policy.trim
    clips = [read_audio(p) for p in df.audio_filepath]
    between = [(.02 * np.r_[hiss, c, hiss] + .05).astype(np.float32) for c in clips]
    heard = late[0], r.transcribe(between)
    assert wer([x["text"] or "-" for x in heard[0]], [x["text"] for x in heard[1]]) < .12
    assert abs(np.median(delays(heard, lambda words: words)) - 2) < .06
    assert all(len(a) < len(b) - 90 for a, b in zip(r.log_probs(between), Recognizer(bundle).log_probs(between)))      # about three seconds of every clip are not listened to
    whole = r.transcribe(between[:8], each=[dict(cut=True)] * 8)
    assert all(abs(x["duration"] - len(c) / 16000) < .01 for x, c in zip(whole, between))
    write_json(tmp_path / "bundle" / "config.json", read_json(bundle / "config.json") | dict(policy=dict(trimm=True)))
    with pytest.raises(InputError, match="a policy has no field"): Recognizer(tmp_path / "bundle")


def test_base_bundle_takes_keywords(base):
    "Listening for the words that are spoken helps; listening for words that are not costs little."
    _, bundle, df = base
    r = Recognizer(bundle)
    clips = [read_audio(p) for p in df.audio_filepath]
    plain = wer(df.text, [x["text"] for x in r.transcribe(clips)])
    own = r.transcribe(clips, each=[dict(keywords=t.split()) for t in df.text])
    assert wer(df.text, [x["text"] for x in own]) <= plain
    other = r.transcribe(clips, keywords=["zanzibar", "quetzal", "bjorn", "oxymoron", "flugelhorn"])
    assert wer(df.text, [x["text"] for x in other]) <= plain + .03


def test_base_bundle_on_people(base, tmp_path):
    "AN4's dev speakers, where that corpus is found."
    if not setting("CORPORA") or not Path(setting("CORPORA"), "an4").is_dir(): pytest.skip("AN4 not found under CORPORA")
    from voicelab.importers import import_corpus
    model, bundle, _ = base
    df = import_corpus("an4").query("split == 'dev'").iloc[::4].reset_index(drop=True)
    checks = check_bundle(bundle, model, df)
    assert checks.ok.all(), checks.to_string()
    assert wer(df.text, [x["text"] for x in Recognizer(bundle).transcribe([read_audio(p) for p in df.audio_filepath])]) < .2


def test_offline_example(base):
    "On one core, without PyTorch, within 300 MB: what a small board has."
    _, bundle, df = base
    def example(*args): return subprocess.run([sys.executable, Path(__file__).parent.parent/"examples"/"offline.py", *args], capture_output=True, text=True)
    done = example(bundle, *df.audio_filepath.head(4))
    assert done.returncode == 0 and done.stdout.count("\n") == 4, done.stderr
    assert "PyTorch not imported" in done.stderr and int(re.search(r"peak memory (\d+) MB", done.stderr)[1]) < 300, done.stderr
    assert [l.split(": ", 1)[1].rsplit("  (", 1)[0] for l in done.stdout.splitlines()] == [r["text"] for r in Recognizer(bundle).transcribe([read_audio(p) for p in df.audio_filepath.head(4)])]
    bad = example(bundle, "no.wav")
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


def test_memory_stays_bounded(tmp_path):
    "Two hundred clips and one of five minutes in one call need less than 300 MB beyond the loaded recogniser."
    toy_bundle(tmp_path/"toy")
    code = f"""
import resource, numpy as np
from voicelab.recognizer import Recognizer
r = Recognizer({str(tmp_path/'toy')!r}); rng = np.random.default_rng(0)
clips = [rng.normal(0, .1, 48000).astype(np.float32) for _ in range(200)] + [rng.normal(0, .1, 300*16000).astype(np.float32)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(r.transcribe(clips)) == 201
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 300, f"{grown:.0f} MB"


def _contend(root, bundle, i, start, results):
    registry = Registry(root)
    start.wait()
    version = registry.register("m", bundle)
    try: results.put((version, registry.promote("m", version, f"process {i}", "race", expect=None)))
    except InputError: results.put((version, None))


def test_processes_register_and_race_for_champion(tmp_path):
    toy_bundle(tmp_path/"toy")
    Registry(tmp_path/"r")
    context = mp.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_contend, args=(tmp_path/"r", tmp_path/"toy", i, start, results)) for i in range(4)]
    for p in processes: p.start()
    start.set()
    got = [results.get(timeout=120) for _ in processes]
    for p in processes: p.join(30)
    registry = Registry(tmp_path/"r")
    winners = [v for v, champion in got if champion]
    assert sorted(v for v, _ in got) == [1, 2, 3, 4] == list(registry.versions("m").version)
    assert len(winners) == 1 and registry.aliases("m") == {"champion": winners[0]} and len(registry.log("m")) == 1
    for v in (1, 2, 3, 4): registry.verify(registry.get("m", v))


def test_killed_while_registering(tmp_path):
    "A process that dies between two files of a copy leaves no version, and the next registration is whole."
    toy_bundle(tmp_path/"toy")
    code = f"""
import shutil, sys, time, voicelab.registry as g
copy = shutil.copyfile
def slow(a, b): copy(a, b); print('copied', flush=True); time.sleep(60)
g.shutil.copyfile = slow
g.Registry({str(tmp_path/'r')!r}).register('m', {str(tmp_path/'toy')!r})
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "copied\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    registry = Registry(tmp_path/"r")
    assert registry.versions().empty and registry.names() == []
    with pytest.raises(InputError, match="no model 'm'"): registry.get("m")
    assert registry.register("m", tmp_path/"toy") == 1
    registry.verify(registry.get("m", 1))


def test_flipped_bit_is_refused_and_rollback_still_works(tmp_path):
    toy_bundle(tmp_path/"toy")
    registry = Registry(tmp_path/"r")
    for v in (1, 2): registry.promote("m", registry.register("m", tmp_path/"toy"), "test", f"version {v}")
    path = registry.get("m")/"model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="model.onnx has sha256"): load_recognizer("m", registry=registry)
    registry.rollback("m", "test", "corrupt champion")
    assert load_recognizer("m", registry=registry).label == "m@1"
