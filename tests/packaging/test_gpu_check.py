"""scripts/gpu_check.py where there is no GPU: its limits, what it leaves, and a dry run of it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"
KEPT = {"summary.json", "logs.tar.gz"}


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def take(gpu_check: ModuleType, out: Path, *steps: tuple[str, float, list[str]]) -> list[str]:
    """Results of steps, each a name, its limit and what Python runs."""
    out.mkdir()
    check = gpu_check.Check(out, {})
    for name, seconds, command in steps:
        check.take(gpu_check.Step(name, seconds, [sys.executable, *command]))
    return [told["result"] for told in check.summary["steps"]]


def test_is_done_in_eight_minutes_whatever_happens(gpu_check: ModuleType, tmp_path: Path) -> None:
    steps = gpu_check.steps(tmp_path, tmp_path, tmp_path)
    assert sum(step.seconds for step in steps) <= 480
    names = [step.name for step in steps]
    assert names.index("build") < names.index("decoding tests") < names.index("decoding")
    assert names[-2:] == ["training", "memcheck"]


def test_a_step_that_fails_or_does_not_end_stops_no_other(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    hangs = "import subprocess; subprocess.run(['sleep', '600'])"
    results = take(
        gpu_check,
        tmp_path / "out",
        ("fails", 60, ["-c", "raise SystemExit(3)"]),
        ("hangs", 0.5, ["-c", hangs]),
        ("works", 60, ["-c", "print('the last line')"]),
    )
    assert results == ["failed (3)", "over 0.5 s", "ok"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"][-1]["last_line"] == "the last line"
    assert {path.name for path in (tmp_path / "out").iterdir()} == KEPT
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert {Path(name).name for name in logs.getnames()} >= {"fails.log", "works.log"}


def test_time_that_a_step_leaves_is_for_the_next(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both together take no longer than their limits."""
    steps = [
        gpu_check.Step("quick", 30, [sys.executable, "-c", "pass"]),
        gpu_check.Step("slow", 0.01, [sys.executable, "-c", "pass"]),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: steps)
    assert gpu_check.check(tmp_path / "out", tmp_path, False)


def test_what_is_known_is_written_when_a_step_ends(gpu_check: ModuleType, tmp_path: Path) -> None:
    """The second step reads what the first left, as one who cuts the check then would."""
    out = tmp_path / "out"
    reads = f"print(open({str(out / 'summary.json')!r}).read().count('first'))"
    take(gpu_check, out, ("first", 60, ["-c", "pass"]), ("second", 60, ["-c", reads]))
    assert json.loads((out / "summary.json").read_text())["steps"][1]["last_line"] == "1"


CUT = """
import importlib.util, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("gpu_check", sys.argv[1])
gpu_check = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
hangs = "import os, signal, time; print('so far', flush=True); "
hangs += f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(600)"
ran = [("first", "pass"), ("second", hangs), ("third", "pass")]
gpu_check.steps = lambda *_: [gpu_check.Step(n, 60, [sys.executable, "-c", c]) for n, c in ran]
gpu_check.check(Path(sys.argv[2]), Path(sys.argv[2]), False)
"""


def test_a_check_that_is_cut_leaves_what_the_step_has_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", CUT, str(SCRIPT.with_suffix(".py")), str(out)]
    subprocess.run(command, check=True)
    steps = json.loads((out / "summary.json").read_text())["steps"]
    assert [(told["step"], told["result"]) for told in steps] == [
        ("first", "ok"),
        ("second", "cut"),
    ]
    assert steps[1]["last_line"] == "so far"
    assert {path.name for path in out.iterdir()} == KEPT


def test_a_machine_that_lacks_a_package_is_tried_all_the_same(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    told = gpu_check.FACTS + json.dumps({"missing": ["yaml"], "device": "some GPU"})
    check = gpu_check.Check(tmp_path, {})
    code = f"print({told!r}); print('a warning'); raise SystemExit(1)"
    check.take(gpu_check.Step("facts", 60, [sys.executable, "-c", code]))
    assert check.summary["device"] == "some GPU" and check.summary["missing"] == ["yaml"]


def test_the_tests_that_it_chooses_by_name_are_there(gpu_check: ModuleType, tmp_path: Path) -> None:
    for step in gpu_check.steps(tmp_path, tmp_path, tmp_path):
        if "-k" in step.command:
            *_, file, _, name = step.command
            assert re.search(rf"def test_\w*{name}", (SCRIPT.parents[1] / file).read_text())


def test_facts_name_what_cannot_be_imported(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_check.facts()["missing"] == {}
    monkeypatch.setattr(gpu_check, "NEEDED", ["json", "no_such_package"])
    assert list(gpu_check.facts()["missing"]) == ["no_such_package"]


def test_builds_for_the_gpu_that_is_there_alone(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), str(tmp_path / "wheels")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    out = tmp_path / "out"
    command = ["bash", str(SCRIPT), str(out), str(tmp_path / "wheels"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {"gpu_decode.json", "gpu.json", "gpu_train.json"}
    assert {path.name for path in out.iterdir()} == KEPT | figures
    decoding = json.loads((out / "gpu_decode.json").read_text())
    assert decoding["small, 2 + 2 Transformer, width 128, 1 rows"]["seconds_per_byte"]["engine"] > 0


@pytest.mark.slow
def test_wheels_for_the_machine(gpu_check: ModuleType, tmp_path: Path) -> None:
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
