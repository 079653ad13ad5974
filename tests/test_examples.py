"""Every example runs with --quick, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


LONG = (  # 10 s and more each, where two run beside each other
    "checkpoint_reshard.py",
    "comm_dgc.py",
    "comm_federated.py",
    "comm_federated_picture.py",
    "comm_layerwise.py",
    "comm_masha.py",
    "comm_one_byte.py",
    "comm_stragglers.py",
    "fit_in_memory.py",
    "huggingface.py",
    "manual_plan.py",
    "quickstart.py",
    "train_gpt_text.py",
    "unlike_devices.py",
)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.name in LONG else path for path in EXAMPLES],
    ids=lambda path: path.name,
)
def test_runs(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(path), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_some_and_they_are_short():
    assert EXAMPLES
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES)
