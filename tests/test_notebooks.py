"""Every library notebook runs from its first cell to its last."""
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(1500)
def test_library_notebooks(tmp_path):
    env = dict(os.environ, VOICELAB_HOME=str(tmp_path), OMP_NUM_THREADS="1", VOICELAB_THREADS="1")
    done = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--n_workers", "2"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
