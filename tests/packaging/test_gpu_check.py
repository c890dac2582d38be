"""scripts/gpu_check.py where there is no GPU: its limits, what it leaves, and a dry run of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
KEPT = {"summary.json", "log.txt"}
# A check of steps of its own, each a name, its limit and what Python runs.
CHECK = """
import json, sys
from pathlib import Path

scripts, out, steps = sys.argv[1:]
sys.path.insert(0, scripts)
import gpu_check

gpu_check.steps = lambda *_: [
    gpu_check.Step(name, seconds, [sys.executable, "-c", code])
    for name, seconds, code in json.loads(steps)
]
sys.exit(not gpu_check.check(Path(out), Path(), False))
"""


def check(out: Path, *steps: tuple[str, float, str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """The status of a check, and of each step its result and its last line."""
    command = [sys.executable, "-c", CHECK, str(SCRIPTS), str(out), json.dumps(steps)]
    status = subprocess.run(command).returncode
    assert {path.name for path in out.iterdir()} == KEPT
    told = json.loads((out / "summary.json").read_text())["steps"]
    return status, {step["step"]: (step["result"], step["last_line"]) for step in told}


def test_is_done_in_eight_minutes_whatever_happens(tmp_path: Path) -> None:
    steps = gpu_check.steps(tmp_path, tmp_path, tmp_path)
    assert sum(step.seconds for step in steps) <= 480
    names = [step.name for step in steps]
    assert names.index("build") < names.index("decoding tests") < names.index("gpu_decode")
    assert names[-2:] == ["gpu_train", "memcheck"]


def test_a_step_that_fails_or_does_not_end_stops_no_other(tmp_path: Path) -> None:
    status, results = check(
        tmp_path,
        ("hangs", 0.5, "import subprocess; subprocess.run(['sleep', '600'])"),
        ("fails", 60, "raise SystemExit(3)"),
        ("works", 60, "print('the last line')"),
    )
    assert status == 1
    assert [result for result, _ in results.values()] == ["over 0.5 s", "failed (3)", "ok"]
    assert results["works"] == ("ok", "the last line")


def test_time_that_a_step_leaves_is_for_the_next(tmp_path: Path) -> None:
    """Both together take no longer than their limits."""
    status, _ = check(tmp_path, ("quick", 60, "pass"), ("slow", 0.01, "pass"))
    assert status == 0


def test_a_check_that_is_cut_leaves_what_is_known(tmp_path: Path) -> None:
    cut = "print('so far', flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    status, results = check(
        tmp_path,
        ("first", 60, "print('known')"),
        ("second", 60, f"import os, signal, time; {cut}"),
        ("third", 60, "pass"),
    )
    assert status != 0 and results == {"first": ("ok", "known")}
    assert (tmp_path / "log.txt").read_text() == "== first\nknown\n== second\nso far\n"


def test_the_tests_that_it_chooses_by_name_are_there(tmp_path: Path) -> None:
    for step in gpu_check.steps(tmp_path, tmp_path, tmp_path):
        if "-k" in step.command:
            *_, file, _, name = step.command
            assert re.search(rf"def test_\w*{name}", (SCRIPTS.parent / file).read_text())


def test_facts_name_what_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.find_facts()["missing"] == {}
    monkeypatch.setattr(gpu_check, "NEEDED", ["json", "no_such_package"])
    assert list(gpu_check.find_facts()["missing"]) == ["no_such_package"]


def test_builds_for_the_gpu_that_is_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine sets: for older GPUs it would take too long, or not compile."""
    for name in ("MBLM_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.setenv(name, "7.5;9.0+PTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    lacks_library = subprocess.CompletedProcess([], returncode=1)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: lacks_library)
    begun: list[dict[str, str]] = []
    monkeypatch.setattr(gpu_check.os, "execv", lambda *_: begun.append(dict(os.environ)))
    gpu_check.build()
    assert begun[0]["TORCH_CUDA_ARCH_LIST"] == "9.0" and begun[0]["MBLM_BUILD"] == "cuda"


def run_script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), str(out), "no-wheels", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run_script(tmp_path)
    assert done.returncode == 1 and "no GPU" in done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["device"] is None


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {"gpu_decode.json", "gpu.json", "gpu_train.json"}
    assert {path.name for path in tmp_path.iterdir()} == KEPT | figures
    decoding = json.loads((tmp_path / "gpu_decode.json").read_text())
    assert decoding["small, 2 + 2 Transformer, width 128, 1 rows"]["seconds_per_byte"]["engine"] > 0


@pytest.mark.slow
def test_wheels_for_the_machine(tmp_path: Path) -> None:
    """Each is there once, for Python 3.12 on x86-64, and all together are small."""
    try:
        gpu_check.fetch(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"NO PACKAGE INDEX CAN BE REACHED: {error}")
    names = [path.name.split("-")[0].lower() for path in tmp_path.iterdir()]
    wanted = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection", "mambapy"}
    assert wanted | {"mblm", "megabyte_pytorch", "einops", "beartype"} <= set(names)
    assert len(names) == len(set(names))
    (core,) = tmp_path.glob("pydantic_core-*")
    assert "cp312" in core.name and "x86_64" in core.name
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 16 << 20
