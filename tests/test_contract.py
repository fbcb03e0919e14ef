"""schemathesis reads /openapi.json and asks a running server all that the text allows, and much that it does not."""
import json, os, re, subprocess, sys
from pathlib import Path

import httpx

from voicelab.audio import toy_speech, wav_bytes
from voicelab.keys import Keys
from voicelab.server import server

# in right requests, half of the forms carry a clip that can be heard, and half of the questions for a model name the one that is served: otherwise no good answer would ever be seen
HOOKS = """
from pathlib import Path
import schemathesis
CLIP, MODEL = Path("clip.wav").read_bytes(), "{model}"
@schemathesis.hook
def map_body(context, body):
    return dict(body, file=CLIP) if isinstance(body, dict) and "file" in body and len(str(body)) % 2 else body
@schemathesis.hook
def map_path_parameters(context, path_parameters):
    return dict(path_parameters, model=MODEL) if path_parameters and len(path_parameters.get("model", "")) % 2 else path_parameters
"""
EXAMPLES = int(os.environ.get("VOICELAB_TEST_EXAMPLES", "60"))   # requests of each route


def asked(url, mode, folder, *options) -> dict:
    "What a server answered to requests that OpenAPI allows (`positive`) or forbids: statuses by route."
    hooks = dict(SCHEMATHESIS_HOOKS="hooks") if mode == "positive" else {}
    # not asked: is every request that the schema allows accepted? A file that is no audio cannot be. Nor whether a wrong method is the first thing that is wrong with a wrong request
    done = subprocess.run([str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--mode", mode, "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "1",
                           "--exclude-checks", "positive_data_acceptance" + ",unsupported_method" * (mode == "negative"), "--request-timeout", "30", "--no-color", "--report", "har", "--report-har-path", f"{mode}.har", *options],
                          cwd=folder, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(folder), **hooks))
    assert done.returncode == 0, "\n".join(l for l in (done.stdout + done.stderr).splitlines() if l.isprintable() and len(l) < 400)[-6000:]
    seen = {}
    for e in json.loads((folder / f"{mode}.har").read_text())["log"]["entries"]:
        route = e["request"]["method"], re.sub(r"/(subjects|models)/.*", r"/\1/…", e["request"]["url"].split("?")[0].removeprefix(url))
        seen.setdefault(route, set()).add(e["response"]["status"])
    return seen


def test_the_contract_is_kept(toy_home, tmp_path):
    "No answer of status 500 or above, none that OpenAPI does not name, none of another shape; what it forbids is refused."
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_LOG_LEVEL="off")) as url:
        (tmp_path / "clip.wav").write_bytes(wav_bytes(toy_speech(1.)))
        (tmp_path / "hooks.py").write_text(HOOKS.format(model=httpx.get(f"{url}/v1/models").json()["data"][0]["id"]))
        allowed = asked(url, "positive", tmp_path)
        assert httpx.get(f"{url}/readyz").status_code == 200
    keys = Keys(tmp_path / "api.json")
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_LOG_LEVEL="off", VOICELAB_KEYS=str(keys.path))) as url:       # with API keys, as an open server has them
        door = "--header", f"Authorization: Bearer {keys.add('schemathesis', 'admin', per_minute=1_000_000)}"
        forbidden = asked(url, "negative", tmp_path, *door)
        assert httpx.get(f"{url}/readyz").status_code == 200
    assert max(map(len, forbidden.values())) > 1, "only the key was refused"
    for route in (("POST", "/v1/audio/transcriptions"), ("POST", "/v1/search"), ("POST", "/v1/feedback"), ("DELETE", "/v1/subjects/…"), ("GET", "/v1/models/…"), ("GET", "/readyz")):
        assert 200 in allowed[route], (route, allowed)                   # the good answers were held against the contract, too
    assert 404 in allowed["GET", "/v1/models/…"] and 400 in forbidden["POST", "/v1/audio/transcriptions"], (allowed, forbidden)
