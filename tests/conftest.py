"""What several tests need: a working state of their own, a model in its registry, a running server."""
import glob, os, shutil, subprocess, tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from websockets.sync import client

from voicelab.core import free_port, package_path
from voicelab.export import export_bundle, toy_bundle
from voicelab.registry import Registry


def connect(url, **more):
    "A WebSocket, with time enough for a busy machine."
    return client.connect(url, **{"open_timeout": 60, **more})


def processes(home) -> list:
    "The processes of a server with this working state, but not ourselves."
    def of(p):
        with suppress(psutil.Error): return p.pid != os.getpid() and p.environ().get("VOICELAB_HOME") == str(home)
    return [p for p in psutil.process_iter() if of(p)]


@pytest.fixture(scope="session")
def base_bundle(tmp_path_factory) -> Path:
    "The base model, exported."
    from voicelab.model import load_model
    if not (package_path("base") / "model.pt").exists(): pytest.skip("voicelab/base has no model yet")
    return export_bundle(load_model(package_path("base")), tmp_path_factory.mktemp("base") / "bundle", dict(name="base"), lm=package_path("base") / "lm.npz")


def state_with(bundle, home: Path) -> Path:
    "A working state whose champion is this bundle."
    registry = Registry(home / "registry")
    registry.promote("voicesearch", registry.register("voicesearch", bundle), "tests", "to have a model")
    return home


@pytest.fixture(scope="session")
def toy_home(tmp_path_factory) -> Path:
    "A working state whose champion reads tones as letters: instant, and its texts are known."
    home = tmp_path_factory.mktemp("toy")
    return state_with(toy_bundle(home / "bundle"), home)


@pytest.fixture(scope="session")
def base_home(base_bundle, tmp_path_factory) -> Path:
    "A working state whose champion is the base model."
    return state_with(base_bundle, tmp_path_factory.mktemp("basehome"))


@pytest.fixture(scope="session")
def corpora() -> Path:
    "The folder of corpora; tests on recordings of people are skipped without it."
    folder = os.environ.get("VOICELAB_CORPORA", "")
    if not (Path(folder) / "an4" / "train.jsonl").is_file(): pytest.skip("AN4 is not found under VOICELAB_CORPORA")
    return Path(folder)


@pytest.fixture
def postgres(tmp_path_factory):
    "The address of a PostgreSQL of our own, on loopback."
    places = os.pathsep.join([os.environ["PATH"], *sorted(glob.glob("/usr/lib/postgresql/*/bin"))])   # Debian keeps the server's tools off the path
    tools = {n: shutil.which(n, path=places) for n in ("initdb", "pg_ctl")}
    if not all(tools.values()): pytest.skip("no PostgreSQL server on this machine: initdb and pg_ctl are needed to test the log on it")
    folder, port = Path(tempfile.mkdtemp(prefix="voicelab-pg-")), free_port()
    who = dict(user="nobody") if os.geteuid() == 0 else {}                   # PostgreSQL refuses to run as root
    if who: shutil.chown(folder, "nobody")
    run = lambda *args: subprocess.run(args, check=True, capture_output=True, timeout=120, cwd=folder, **who)
    run(tools["initdb"], "-D", f"{folder}/data", "-U", "voicelab", "--auth=trust")
    run(tools["pg_ctl"], "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}", "start")
    yield f"postgresql://voicelab@127.0.0.1:{port}/postgres"
    run(tools["pg_ctl"], "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

def chromium(p, microphone):
    "Chromium whose microphone plays a file."
    return p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                                                             f"--use-file-for-fake-audio-capture={microphone}"])


@pytest.fixture(scope="module")
def chromiums():
    "Playwright, which starts browsers."
    if not CHROMIUM: pytest.skip("no chromium on this machine: install it (apt-get install chromium) to test the page")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as p: yield p


ORDER = ["test_repo", "test_cli", "test_train", "test_notebooks"]  # fast ones first; the whole cycle last

def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: (i.path.stem == "test_cycle", ORDER.index(i.path.stem) if i.path.stem in ORDER else len(ORDER)))
