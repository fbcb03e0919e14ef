"The default corpus by several processes, and the data phase on a corpus with bad rows."
from pathlib import Path

import numpy as np, papermill, pytest, soundfile as sf

from voicelab.core import InputError, read_json, read_jsonl, write_json
from voicelab.manifest import load_version
from voicelab.scope import save_scope, scope_for
from voicelab.synth import RATE, _render_in_process, make_voicesearch, plan, record

ROOT = Path(__file__).resolve().parent.parent


def test_processes_do_not_change_the_bytes(tmp_path):
    sizes = dict(train=10, dev=2, test=2, traffic=2, new_names=2, young=2)
    one = make_voicesearch(tmp_path/"one", sizes, workers=1)
    two = make_voicesearch(tmp_path/"two", sizes, workers=2)
    assert one.sha256.tolist() == two.sha256.tolist()
    assert one.drop(columns="audio_filepath").equals(two.drop(columns="audio_filepath"))


def test_a_failing_process_is_one_line(tmp_path):
    rows = plan(dict(train=1)).drop(columns=["slots", "text"]).to_dict("records")
    rows[0]["variant"] = "nobody"
    (tmp_path/"train").mkdir()
    with pytest.raises(InputError, match="no variant 'nobody'") as e: _render_in_process(rows, str(tmp_path))
    assert "\n" not in str(e.value)


def test_an_interrupted_corpus_is_made_again(tmp_path):
    first = make_voicesearch(tmp_path, dict(train=4), workers=1)
    (tmp_path/"corpus.json").unlink()                       # as if the process had died before it was whole
    Path(first.audio_filepath[0]).write_bytes(b"half")
    assert make_voicesearch(tmp_path, dict(train=4), workers=1).sha256.tolist() == first.sha256.tolist()
    assert sf.info(first.audio_filepath[0]).duration == pytest.approx(first.duration[0], abs=.001)


@pytest.fixture
def bad_corpus(tmp_path, monkeypatch):
    "Eight speakers with three clips each; one clip is silent."
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path/"var"))
    for i, row in enumerate(plan(dict(train=24)).to_dict("records")):
        path = tmp_path/"mine"/f"speaker{i // 3}"/f"clip{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, record(row) if i != 20 else np.zeros(RATE, np.float32), RATE)
        path.with_suffix(".txt").write_text(row["text"])
    return tmp_path/"mine"


def run_phase(tmp_path, corpus, **params):
    run = tmp_path/"run"
    save_scope(scope_for("mine"), run/"scope.json")
    write_json(run/"1_scope.json", dict(outputs=dict(scope=str(run/"scope.json"))))
    papermill.execute_notebook(ROOT/"nbs/phases/2_data.ipynb", run/"2_data.ipynb", progress_bar=False, cwd=str(ROOT),
                               parameters=dict(run_dir=str(run), corpus=str(corpus)) | params)
    return read_json(run/"2_data.json")


def test_the_data_phase_names_bad_rows_and_stops_or_quarantines(tmp_path, bad_corpus):
    with pytest.raises(papermill.PapermillExecutionError, match="silent"): run_phase(tmp_path, bad_corpus)
    assert not (tmp_path/"run/2_data.json").exists()
    result = run_phase(tmp_path, bad_corpus, on_error="quarantine")
    silent = [q["utterance_id"] for q in result["outputs"]["quarantined"] if "silent" in q["problem"]]
    assert len(silent) == 1 and silent[0].startswith("speaker6/clip20")
    df, traffic = load_version(result["outputs"]["version"]), read_jsonl(result["outputs"]["traffic"])
    assert len(df) + len(traffic) + len(result["outputs"]["quarantined"]) == 24
    assert set(df.split) == {"train", "dev", "test"} and not any("text" in t for t in traffic)
    assert not set(df.speaker) & {t["speaker"] for t in traffic}
    assert len(read_jsonl(result["outputs"]["truth"])) == len(traffic)
    report = (tmp_path/"run/2_data.ipynb").read_text()
    assert "<svg" in report and "<audio" not in report                      # the worst rows are shown; heard only with players=True
