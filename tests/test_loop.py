"Faults and leaks of the loop that a notebook cell cannot show: real server, real log, real erasure, broken models."
import json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, onnx, pandas as pd, pytest
from onnx import numpy_helper

from voicelab.audio import read_audio, toy_speech, write_wav
from voicelab.core import InputError, home, read_json, sha256_file, write_json
from voicelab.drift import drift, watch
from voicelab.export import golden_answers, onnx_runner, toy_bundle, toy_tones
from voicelab.labels import LabelQueue, eligible, forget
from voicelab.manifest import list_versions, load_version, withdraw, write_version
from voicelab.monitor import reference_rows, save_report, window_report
from voicelab.recognizer import Recognizer
from voicelab.registry import Registry
from voicelab.requestlog import RequestLog
from voicelab.server import server
from voicelab.simulate import FULL, annotate, drive, read_traffic, split_hidden

LETTERS, PEOPLE = "abcdefgh", 10
CONSENTS = {FULL: 8, "metrics,transcript,audio": 9}     # people 0-7 agree to training, 8 not to training, 9 to nothing


def phrase(rng): return " ".join("".join(rng.choice(list(LETTERS), rng.integers(2, 4))) for _ in range(3))


def tone_clips(folder, people, n, seed, who="p", noise=0.002):
    "Clips that the toy model can read: n of each person."
    rng, rows = np.random.default_rng(seed), []
    for i in range(people * n):
        text, path = phrase(rng), folder/f"{who}{seed}-{i}.wav"
        write_wav(path, (toy_tones(text) + rng.normal(0, noise, len(toy_tones(text)))).astype(np.float32))
        rows.append(dict(audio_filepath=str(path), duration=len(read_audio(path))/16000, text=text, speaker=f"{who}{i % people}", utterance_id=f"{who}{seed}-{i}", source="tones", slice=""))
    return pd.DataFrame(rows)


def golden_bundle(folder):
    toy_bundle(folder)
    write_json(folder/"golden.json", golden_answers(onnx_runner(folder/"model.onnx")))
    return folder


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    "A server with a toy champion, traffic of ten people, a labelled queue: one turn of the loop up to the labels."
    tmp = tmp_path_factory.mktemp("loop")
    saved = {k: os.environ.get(k) for k in ("VOICELAB_HOME", "VOICELAB_MODEL", "VOICELAB_LOG_URL")}
    os.environ.update(VOICELAB_HOME=str(tmp/"home"), VOICELAB_MODEL="toy")
    os.environ.pop("VOICELAB_LOG_URL", None)
    registry = Registry()
    registry.promote("toy", registry.register("toy", golden_bundle(tmp/"toy")), "test", "first")
    base = tone_clips(tmp, 8, 2, 1, "b").assign(split=["train"]*8 + ["dev"]*4 + ["test"]*4, speaker=[f"b{i//2}" for i in range(16)])
    parent = write_version(base, "toy", {}, "")
    clips = tone_clips(tmp, PEOPLE, 6, 2).assign(split="traffic")
    clips["slice"] = np.where(clips.speaker.isin(["p0", "p1", "p2", "p3"]), "young", "")
    traffic = split_hidden(clips, tmp/"traffic.jsonl", tmp/"truth.jsonl")
    number = traffic.speaker.str[1:].astype(int)
    consent = np.select([number < 8, number == 8], [FULL, "metrics,transcript,audio"], "")
    with server() as url: answers = drive(url, traffic.assign(consent=consent), concurrency=4)
    log = RequestLog()
    queue = LabelQueue()
    queue.build(log.rows(), budget=40, drifted=None, double=0.2, seed=3)
    for _ in range(3):
        for person in ("ann", "bea", "cid"): queue.import_labels(annotate(queue.next(100, person), tmp/"truth.jsonl", annotator=person))
    yield dict(tmp=tmp, clips=clips, parent=parent, answers=answers, log=log, queue=queue, registry=registry)
    for k, v in saved.items(): os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)


def on_disk(folder, *needles):
    "Which needles (bytes) stand in which files below a folder."
    return [(n, p) for p in Path(folder).rglob("*") if p.is_file() for n in needles if n in p.read_bytes()]


def test_traffic_is_answered_and_hidden(loop):
    assert (loop["answers"].status == 200).all()
    assert not on_disk(loop["tmp"]/"traffic.jsonl", b"text") and "text" not in read_traffic(loop["tmp"]/"traffic.jsonl")
    truth = dict(zip(loop["clips"].utterance_id, loop["clips"].text))
    assert (loop["answers"].text == loop["answers"].utterance_id.map(truth)).mean() > 0.8


def test_only_training_consent_reaches_people_and_datasets(loop):
    log, rows = loop["log"], loop["log"].rows()
    assert len(rows) == 54                                              # the tenth person agreed to nothing
    may = {log.pseudonym(f"p{i}") for i in range(8)}
    assert set(eligible(rows).subject) == may
    assert set(loop["queue"].tasks().subject) <= may
    assert set(loop["queue"].accepted(rows).consent_id) <= may


def test_a_smuggled_label_without_training_consent_is_left_out(loop):
    "Somebody writes a task for a clip without training consent straight into the queue's file."
    rows, other = loop["log"].rows(), loop["log"].pseudonym("p8")
    victim = rows[rows.subject == other].iloc[0]
    queue = LabelQueue(loop["tmp"]/"smuggled")
    queue.build(rows, budget=5, seed=0)
    tasks = [json.loads(l) for l in (queue.root/"tasks.jsonl").read_text().splitlines()]
    tasks.append(tasks[0] | dict(task_id=victim.request_id, request_id=victim.request_id, subject=other, audio_sha256=victim.audio_sha256, look=1))
    (queue.root/"tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    queue.import_labels([dict(task_id=victim.request_id, text="abc", annotator="x", status="accept")])
    assert victim.request_id in set(queue.labels().request_id)
    assert victim.request_id not in set(queue.accepted(rows).parent_request)


def test_random_clips_only_audit(loop):
    from voicelab.retrain import successor
    labelled = loop["queue"].accepted(loop["log"].rows())
    made = successor(loop["parent"], labelled, "toy", "toy@1", seed=1)
    new, audit = load_version(made["version"]), load_version(made["audit"])
    random = set(labelled[labelled.reason == "random"].sha256)
    assert random and random == set(audit.sha256)
    assert not random & set(new.sha256)
    mine = new[new.source == "traffic"]
    assert not set(mine[mine.split == "train"].speaker) & set(mine[mine.split == "traffic"].speaker)
    assert set(new[new.split == "test"].sha256) == set(load_version(loop["parent"]).query("split == 'test'").sha256)
    assert set(mine.parent_request) <= set(loop["log"].rows().request_id)
    loop["made"] = made


def test_annotators_learn_nothing_but_their_tasks(loop):
    queue, rows = LabelQueue(loop["tmp"]/"few"), loop["log"].rows()
    queue.build(rows, budget=4, double=0, seed=9)
    handed = queue.next(2, "ann")
    said = annotate(handed, loop["tmp"]/"truth.jsonl")
    assert {l["task_id"] for l in said} == {t["task_id"] for t in handed} and len(handed) == 2
    others = set(loop["clips"].text) - {l["text"] for l in said}
    assert not any(o in json.dumps(said) for o in others)


def test_two_processes_never_get_the_same_task(loop):
    queue = LabelQueue(loop["tmp"]/"race")
    queue.build(loop["log"].rows(), budget=40, double=0, seed=5)
    code = "import sys, json; from voicelab.labels import LabelQueue; q = LabelQueue(sys.argv[1])\nprint(json.dumps([t['task_id'] for _ in range(12) for t in q.next(1, sys.argv[2])]))"
    running = [subprocess.Popen([sys.executable, "-c", code, str(queue.root), who], stdout=subprocess.PIPE, text=True) for who in ("ann", "bea", "cid")]
    got = [t for p in running for t in json.loads(p.communicate(timeout=120)[0])]
    assert len(got) == 36 == len(set(got))
    assert len(queue.tasks()) == 40


def test_gate_refuses_a_broken_model_and_the_champion_stays(loop):
    from voicelab.retrain import compare, gate, serving_check, settle
    broken = shutil.copytree(loop["tmp"]/"toy", loop["tmp"]/"broken")
    model = onnx.load(broken/"model.onnx")
    weight = next(w for w in model.graph.initializer if w.name == "w")
    values = numpy_helper.to_array(weight).copy()
    values[:, 20] *= 0                                                  # one letter can no longer be written
    values[np.abs(values).sum(1).argsort()[::-1][:3]] *= 0              # and three bands are not heard
    weight.CopyFrom(numpy_helper.from_array(values, "w"))
    onnx.save(model, broken/"model.onnx")
    write_json(broken/"golden.json", golden_answers(onnx_runner(broken/"model.onnx")))
    old, new = Recognizer(loop["tmp"]/"toy"), Recognizer(broken)
    frozen = compare(tone_clips(loop["tmp"], 12, 3, 7, "f"), old, new)
    checks = serving_check(broken, loop["tmp"]/"toy", slower=5)
    decision = gate(frozen, {"young": compare(tone_clips(loop["tmp"], 10, 2, 8, "y"), old, new)}, checks)
    assert checks.ok.all() and decision["verdict"] == "refuse" and "worse on the frozen set" in decision["reasons"][0]
    before = loop["registry"].aliases("toy")["champion"]
    settled = settle("toy", broken, decision, before)
    assert loop["registry"].aliases("toy")["champion"] == before and loop["registry"].aliases("toy")["challenger"] == settled["version"]
    written = read_json(settled["file"])
    assert written["verdict"] == "refuse" and written["champion_after"] == before and written["frozen"]["lo"] > 0


def test_gate_promotes_what_repairs_it_and_rollback_undoes(loop):
    from voicelab.retrain import compare, gate, serving_check, settle
    registry = Registry(loop["tmp"]/"other")
    registry.promote("toy", registry.register("toy", loop["tmp"]/"broken"), "test", "a bad champion")
    old, new = Recognizer(loop["tmp"]/"broken"), Recognizer(loop["tmp"]/"toy")
    decision = gate(compare(tone_clips(loop["tmp"], 12, 3, 7, "f"), old, new), {}, serving_check(loop["tmp"]/"toy", loop["tmp"]/"broken", slower=5))
    settled = settle("toy", loop["tmp"]/"toy", decision, 1, registry=registry)
    assert settled["verdict"] == "promote" and registry.aliases("toy")["champion"] == 2
    assert registry.rollback("toy", "test", "undo") == 1
    assert list(registry.log("toy").query("alias == 'champion'").new) == [1, 2, 1]
    with pytest.raises(InputError, match="champion"): registry.promote("toy", 2, "test", "late", expect=2)


def test_challenger_is_trained_from_the_champion_and_a_withdrawn_version_refuses(loop):
    from voicelab.model import CTCModel, ModelConfig, load_model, save_model
    from voicelab.retrain import GENTLE, train_challenger
    from voicelab.train import TrainConfig
    champion = loop["tmp"]/"champion-run"
    save_model(champion, CTCModel(ModelConfig(dim=32, layers=1)), {})
    config = TrainConfig(**(GENTLE | dict(epochs=1, average=1, check_every=1, workers=0, batch_seconds=3, lr=1e-2)))
    bundle, metrics = train_challenger(loop["parent"], loop["tmp"]/"challenger-run", champion, config, "toy", log=False)
    assert metrics["parent"] == str(champion) and Path(metrics["run"], "model.pt").is_file() and Recognizer(bundle).transcribe([toy_speech(1, seed=0)])[0]["text"] is not None
    same = [np.allclose(a.detach(), b.detach()) for a, b in zip(load_model(champion).parameters(), load_model(loop["tmp"]/"challenger-run").parameters())]
    assert not all(same)
    spare = write_version(tone_clips(loop["tmp"], 4, 2, 11, "w").assign(split=["train"]*4 + ["dev"]*4), "spare", {}, "")
    withdraw(spare, load_version(spare).utterance_id[:1])
    with pytest.raises(InputError, match="withdrawn"): train_challenger(spare, loop["tmp"]/"never", champion, config, log=False)
    assert not (loop["tmp"]/"never").exists()


def test_an_erased_person_is_gone_everywhere(loop):
    log, queue = loop["log"], loop["queue"]
    made = loop.get("made") or pytest.skip("needs the successor version")
    train = load_version(made["version"]).query("split == 'train' and source == 'traffic'")
    who = next(f"p{i}" for i in range(8) if log.pseudonym(f"p{i}") in set(train.consent_id))
    pseudonym, rows = log.pseudonym(who), log.rows()
    mine = rows[rows.subject == pseudonym]
    texts = [t.encode() for t in mine.text if t] + [loop["clips"].set_index("utterance_id").text[u].encode() for u in loop["clips"][loop["clips"].speaker == who].utterance_id]
    sounds, ids = list(mine.audio_path), [i.encode() for i in mine.request_id]
    version = loop["registry"].register("toy", loop["tmp"]/"toy", lineage=dict(dataset_version=made["version"]))
    report = forget(who, log, loop["registry"])
    assert report["rows"] == len(mine) and report["audio"] == len(sounds) and report["labels"] > 0
    assert report["models"] == [f"toy@{version}"]
    assert made["version"] in report["datasets"]
    with pytest.raises(InputError, match="withdrawn"): load_version(made["version"])
    assert not any(Path(p).exists() for p in sounds)
    assert pseudonym not in set(log.rows().subject) | set(queue.tasks().subject) | set(queue.accepted(log.rows()).consent_id)
    living = [load_version(v) for v in list_versions().query("not withdrawn")["id"]]
    assert not any("consent_id" in v and (v.consent_id == pseudonym).any() for v in living)
    shas = set(mine.audio_sha256.dropna())
    assert not [p for p in home("data", "blobs").rglob("*") if p.is_file() and sha256_file(p) in shas]
    left = on_disk(home("log").parent, *texts)
    assert not left, left[:3]
    assert not on_disk(home("labels"), *ids)


def test_reports_are_strict_json(loop):
    rows = loop["log"].rows()
    reference = reference_rows(tone_clips(loop["tmp"], 20, 4, 21, "r"), Recognizer(loop["tmp"]/"toy"))
    report = window_report(rows, reference, {"abc"}, None, name="toy-window")
    def refuse(x): raise AssertionError(f"{x} is no JSON")
    again = json.loads(save_report(report).read_text(), parse_constant=refuse)
    assert again["traffic"]["requests"] == len(rows) and again["wer"]["wer"] is None and again["errors"]["by_status"] == {"200": len(rows)}


@pytest.mark.skipif(not os.environ.get("VOICELAB_CORPORA"), reason="needs AN4 under VOICELAB_CORPORA")
def test_drift_on_recordings_of_people():
    "Clean speakers of AN4 raise nothing; the same clips in noise, or quieter, are found, and named."
    from voicelab.audio import audio_stats
    from voicelab.importers import import_corpus
    from voicelab.noise import add_noise, colored_noise
    an4 = import_corpus("an4").query("split == 'train'")
    people = sorted(an4.speaker.unique()); rng = np.random.default_rng(0)
    window_people = set(rng.choice(people, 20, replace=False))
    clips = an4.groupby("speaker").head(8)
    def rows(df, change): return pd.DataFrame([audio_stats(change(read_audio(p))) for p in df.audio_filepath]).assign(subject=list(df.speaker))
    theirs = clips[clips.speaker.isin(window_people)]
    reference, clean = rows(clips[~clips.speaker.isin(window_people)], lambda x: x), rows(theirs, lambda x: x)
    assert not drift(reference, clean).flagged.any()
    noisy = drift(reference, rows(theirs, lambda x: add_noise(x, colored_noise(len(x)/16000, rng), 5.0, rng))).set_index("signal")
    assert noisy.flagged["snr_db"] and noisy.effect["snr_db"] > 0.5
    quiet = drift(reference, clean.assign(loudness_db=clean.loudness_db - 15)).set_index("signal")
    assert list(quiet[quiet.flagged].index) == ["loudness_db"]
    alerts = watch(reference, pd.concat([clean, clean.assign(snr_db=clean.snr_db - 25)]), size=100)
    assert set(alerts[alerts.alert].signal) == {"snr_db"}


def test_hard_clips_are_no_wrong_rate(tmp_path):
    "What the queue hands out is high and fast more often than not: verification of a corpus would call that a wrong sample rate, the labels are kept."
    from voicelab.distort import speed
    from voicelab.retrain import _sorted_out
    from voicelab.synth import make_voicesearch
    from voicelab.verify import verify
    rows = make_voicesearch(tmp_path / "clips", dict(train=24), seed=5).query("split == 'train'").reset_index(drop=True)
    for i, p in enumerate(rows.audio_filepath): write_wav(tmp_path / f"{i}.wav", speed(read_audio(p), 2))
    rows = rows.assign(audio_filepath=[str(tmp_path / f"{i}.wav") for i in range(len(rows))], duration=rows.duration / 2, source="traffic")
    rows["sha256"] = [sha256_file(p) for p in rows.audio_filepath]
    assert (verify(rows).problem == "wrong_rate").sum() == len(rows)
    kept, refused = _sorted_out(rows, rows.head(0))
    assert len(kept) > .8 * len(rows) and "wrong_rate" not in {r["problem"] for r in refused}, refused


def test_errors_on_wrong_labels_are_marked_and_honest_ones_are_not(tmp_path):
    "Two labels are exchanged; a third clip is masked by noise, so that the model errs by itself. The model has learnt none of them."
    from voicelab.consistency import judge
    from voicelab.errors import mark_label_errors, on_labels_in_doubt, priorities, slices, worst_html
    from voicelab.evaluate import evaluate
    from voicelab.scope import Scope
    clips, toy = tone_clips(tmp_path, 5, 4, 3), Recognizer(toy_bundle(tmp_path/"toy"))
    a, b = 0, next(i for i in range(1, len(clips)) if clips.text[i] != clips.text[0])
    clips.loc[[a, b], "text"] = clips.text[[b, a]].to_numpy()
    faint = next(i for i in range(1, len(clips)) if i != b)
    x = read_audio(clips.audio_filepath[faint])
    x[len(x)//2:] *= .02                                                # the second half can hardly be heard: the model loses it, unsure
    write_wav(clips.audio_filepath[faint], x)
    table = evaluate(clips, toy)
    wrong = table[table.errors > 0]
    assert set(wrong.index) == {a, b, faint}
    marked = mark_label_errors(table, judge(wrong, toy.log_probs([read_audio(p) for p in wrong.audio_filepath])))
    assert set(marked.index[marked["label?"]]) == {a, b}
    said = on_labels_in_doubt(marked)
    assert said["clips"] == 2 and said["errors"] == table.errors[[a, b]].sum() and said["of"] == table.errors.sum()
    assert worst_html(marked).count("label?") == 2
    first = priorities(slices(marked), Scope(), table=marked).iloc[0]
    assert (first["what"], first["kind"]) == ("labels in doubt", "relabel")
