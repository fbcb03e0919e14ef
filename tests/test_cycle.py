"""The whole life cycle, as a newcomer runs it: seven phases, a deployed champion, a scorecard. Last, because it is longest."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VOICELAB = Path(sys.executable).parent / "voicelab"
PHASES = ["1_scope", "2_data", "3_train", "4_errors", "5_deploy", "6_monitor", "7_retrain"]


def run_cycle(corpus, home):
    "A quick cycle into reports/ci-<corpus>, from nothing."
    run = ROOT / "reports" / f"ci-{corpus}"
    shutil.rmtree(run, ignore_errors=True)
    done = subprocess.run([VOICELAB, "cycle", "--corpus", corpus, "--run", f"reports/{run.name}"], cwd=ROOT, env=dict(os.environ, VOICELAB_HOME=str(home)),
                          capture_output=True, text=True, timeout=1500)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout


def check(run, out, home, corpus):
    from voicelab.registry import Registry
    results = {p: json.loads((run / f"{p}.json").read_text()) for p in PHASES}
    assert all(r["ok"] for r in results.values())
    for p in PHASES:
        assert (run / f"{p}.html").stat().st_size > 10_000
        assert results[p]["handoff"]["to"] and results[p]["handoff"]["accepts"], p
    card = json.loads((run / "scorecard.json").read_text())
    assert {"wer", "latency_p95_ms"} <= {r["metric"] for r in card if r["measured"] is not None}
    assert "Scorecard" in out
    registry = Registry(home / "registry")
    assert registry.aliases(corpus)["champion"] in (results["5_deploy"]["outputs"]["version"], results["7_retrain"]["outputs"]["version"])
    assert {"snr_db", "lufs", "pitch_hz", "speech_share"} <= set(results["4_errors"]["metrics"]["tags"])         # cut along what can be measured, too
    deployed = results["5_deploy"]["metrics"]
    assert len(deployed["behaviour"]) == 9 and all(r["ok"] for r in deployed["behaviour"])          # the first champion behaves, too
    assert [r["part"] for r in deployed["ceiling"]][:4] == ["endpointing", "search", "language model", "acoustic model"] and deployed["limit"]
    assert results["6_monitor"]["metrics"]["requests"] > 100
    return results


@pytest.mark.timeout(1800)
def test_cycle_on_the_default_corpus(tmp_path):
    run, out = run_cycle("voicesearch", tmp_path)
    results = check(run, out, tmp_path, "voicesearch")
    assert results["4_errors"]["metrics"]["wer"] < 0.13
    assert results["7_retrain"]["metrics"]
    again = subprocess.run([VOICELAB, "cycle", "--corpus", "voicesearch", "--run", f"reports/{run.name}"], cwd=ROOT, env=dict(os.environ, VOICELAB_HOME=str(tmp_path)),
                           capture_output=True, text=True, timeout=120)
    assert again.stdout.count("done before") == 7, again.stdout + again.stderr      # a finished cycle is not run again


@pytest.mark.timeout(1800)
def test_cycle_on_recordings_of_people(corpora, tmp_path):
    run, out = run_cycle("an4", tmp_path)
    results = check(run, out, tmp_path, "an4")
    assert results["2_data"]["outputs"]["eval_split"] == "dev"      # the official test set is not read by a test suite
    assert results["4_errors"]["metrics"]["wer"] < 0.18
    story = subprocess.run([VOICELAB, "phase", "8_noise", "-p", "run_dir=reports/ci-an4-noise", "-p", f"cycle=reports/{run.name}", "-p", "epochs=1", "-p", "trainings=2", "-p", "shares=[1.0, 0.5]", "-p", "control=false"], cwd=ROOT, env=dict(os.environ, VOICELAB_HOME=str(tmp_path)),
                           capture_output=True, text=True, timeout=900)
    assert story.returncode == 0, story.stdout + story.stderr
    told = json.loads((ROOT / "reports" / "ci-an4-noise" / "8_noise.json").read_text())
    assert told["metrics"]["first"].startswith("snr_db") and told["params"]["augment"]["noise"] > .5           # found among what can be measured of a clip, nobody told it which were noisy
    assert told["metrics"]["test"] is None and told["metrics"]["dev"]["street 0 dB"]["before"] > told["metrics"]["dev"]["quiet"]["before"]
