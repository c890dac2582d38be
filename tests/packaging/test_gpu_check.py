"""scripts/gpu_check.sh where there is no GPU: what it says, and what it reports of its steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"

# Stands in for the interpreter: the checks pass, the tests do as they are told.
STAND_IN = """#!/usr/bin/env bash
case "$1" in
  -) cat > /dev/null; echo '{"device": "a GPU"}' > "$2/facts.json" ;;
  setup.py) echo built ;;
  -m) echo "1 | passed"; exit "$TESTS_EXIT" ;;
  benchmarks/*) echo measured ;;
  -c) case "$2" in "import torch"*) echo 9.0 ;; *) exec "$REAL" "$@" ;; esac ;;
esac
"""


def check(out: Path, *folders: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), *folders],
        env={**os.environ, "PYTHON": sys.executable, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 2
    assert "sees none" in done.stderr or "missing:" in done.stderr


@pytest.mark.parametrize("tests_exit", [0, 1])
def test_reports_every_step(tmp_path: Path, tests_exit: int) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {"PYTHON": str(stand_in), "REAL": sys.executable, "TESTS_EXIT": str(tests_exit)}
    done = check(tmp_path / "out", CUDA_HOME="/nowhere", **environment)
    assert done.returncode == tests_exit, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["device"] == "a GPU"
    results = {step["step"]: step["result"] for step in summary["steps"]}
    done_steps = ("build", "benchmark", "decoding", "training")
    assert all(results[step] == "ok" for step in done_steps)
    assert results["tests"] == ("failed (1)" if tests_exit else "ok")
    assert done.stdout.splitlines()[-6].startswith("build")


def test_is_done_in_nine_minutes_whatever_happens() -> None:
    limits = re.findall(r"^ *step [a-z]+ (\d+) ", SCRIPT.read_text(), flags=re.MULTILINE)
    assert len(limits) == 6
    assert sum(map(int, limits)) < 540


def test_hands_the_reference_to_the_training_step(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.replace("echo measured", 'echo "measured $*"'))
    stand_in.chmod(0o755)
    reference = tmp_path / "a folder"
    reference.mkdir()
    environment = {"PYTHON": str(stand_in), "REAL": sys.executable, "TESTS_EXIT": "0"}
    done = check(tmp_path / "out", "", str(reference), CUDA_HOME="/nowhere", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "training.log").read_text()
    assert f"benchmarks/gpu_train.py --wheels {reference} --runs" in log
