"""Rules of the repository that a machine can check."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PHASES = sorted((ROOT / "nbs" / "phases").glob("*.ipynb"))


def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def exported(path): return [source(c) for c in cells(path) if c["cell_type"] == "code" and re.match(r"#\|\s*exporti?\b", source(c))]
def module_of(path): return next((m[1] for c in cells(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))), None)


def test_clean_and_export_leave_no_difference(tmp_path):
    "The committed notebooks are clean and the package is what they export."
    for name in ("nbs", "voicelab", "settings.ini", "pyproject.toml", "README.md"):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif (ROOT / name).exists(): shutil.copy(ROOT / name, tmp_path / name)
    bin = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"): subprocess.run([bin / command], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    def state(root): return {str(p.relative_to(root)): p.read_bytes() for d in ("nbs", "voicelab") for p in sorted((root / d).rglob("*"))
                             if p.is_file() and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    before, after = state(ROOT), state(tmp_path)
    assert sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)) == []


def test_every_module_has_its_notebook():
    modules = {p.stem for p in (ROOT / "voicelab").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == {module_of(p) for p in NOTEBOOKS}


def test_imports_point_to_lower_numbers():
    number = {module_of(p): int(p.name[:2]) for p in NOTEBOOKS}
    wrong = []
    for name, own in number.items():
        for node in ast.walk(ast.parse((ROOT / "voicelab" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and (node.level or node.module.startswith("voicelab")):
                other = node.module.removeprefix("voicelab").strip(".")
                names = [other.split(".")[0]] if other else [a.name for a in node.names]
                wrong += [f"{name} imports {n}" for n in names if n in number and number[n] >= own]
    assert wrong == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_library_notebook(path):
    "Title and subtitle, prose, visible tests beside what they test."
    first = source(cells(path)[0])
    assert re.match(r"# .+\n\n> .+", first), f"{path.name} must begin with a title and a subtitle"
    tests = [c for c in cells(path) if c["cell_type"] == "code" and re.search(r"\bassert\b|\btest_\w+\(", source(c)) and not re.match(r"#\|\s*(export|hide)", source(c))]
    assert tests, f"{path.name} asserts nothing in the open"
    assert not any(re.search(r"#\|\s*eval:\s*false", source(c)) for c in cells(path)), f"{path.name} has a cell that is never run"


@pytest.mark.parametrize("path", PHASES, ids=lambda p: p.stem)
def test_phase_notebook(path):
    "One cell of literal parameters, and nothing exported."
    from voicelab.pipeline import defaults
    assert defaults(path)
    assert exported(path) == [] and module_of(path) is None


def test_phases_are_those_of_the_pipeline():
    from voicelab.pipeline import PHASES as order
    assert [p.stem for p in PHASES if p.stem not in ("0_base", "8_noise")] == order          # those two stand beside the cycle
    assert (ROOT / "nbs" / "phases" / ".notest").exists()


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PHASES], ids=lambda p: p.stem)
def test_notebook_names_its_kernel(path):
    "Without it papermill cannot run it, and JupyterLab asks."
    assert json.loads(path.read_text())["metadata"].get("kernelspec", {}).get("name") == "python3"


def test_notebooks_are_small():
    "Stored outputs stay small, and no audio is stored."
    for p in [*NOTEBOOKS, *PHASES, *(ROOT / "reports").glob("executed/*/*")]:
        assert p.stat().st_size < 1_500_000, p
        if p.suffix == ".ipynb":
            outputs = json.dumps([c.get("outputs", []) for c in cells(p)])
            assert "audio/wav" not in outputs and "data:audio" not in outputs, p


SERVING = ["torch", "pytorch_lightning", "lightning", "wandb", "torchaudio", "IPython", "nbdev", "matplotlib"]

def test_serving_imports_no_training_library():
    code = f"import sys, voicelab.serve; print([m for m in {SERVING!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_command_line_loads_nothing_to_say_help():
    code = "import sys, voicelab.cli; voicelab.cli.make_parser(); print([m for m in ['numpy', 'pandas', 'torch', 'ray'] if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_settings_stand_in_the_readme():
    from voicelab.core import SETTINGS
    readme = (ROOT / "README.md").read_text()
    assert [k for k in SETTINGS if f"VOICELAB_{k}" not in readme] == []


def test_no_recordings_and_nothing_large_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    files = [ROOT / f for f in listed.stdout.splitlines() if (ROOT / f).is_file()]
    assert [str(f) for f in files if f.suffix in {".wav", ".flac", ".mp3", ".m4a", ".webm", ".ogg"}] == []
    assert [str(f) for f in files if f.stat().st_size > 16_000_000] == []


def test_base_model_is_small_and_has_its_card():
    base = ROOT / "voicelab" / "base"
    assert sum(p.stat().st_size for p in base.iterdir()) <= 15_000_000
    assert "AN4" in (base / "model_card.md").read_text()
    assert not re.search(r'"/[\w.-]+/', (base / "config.json").read_text()), "a folder of the machine that made it"
