"""benchmarks/gpu_train.py where there is no GPU: what it says of a reference, and its ratios."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_train", BENCHMARKS / "gpu_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_says_which_wheels_it_wants(gpu_train: ModuleType, tmp_path: Path) -> None:
    for wheels in (None, tmp_path):
        error = gpu_train.install(wheels, tmp_path / "site")["error"]
        assert "mblm==0.4.2, megabyte-pytorch, einops, beartype, mambapy" in error


def test_another_release_is_not_the_reference(gpu_train: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mblm-0.4.1-py3-none-any.whl").touch()
    error = gpu_train.install(tmp_path, tmp_path / "site")["error"]
    assert "missing: mblm==0.4.2" in error


def test_a_wheel_that_does_not_install_is_told(gpu_train: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mblm-0.4.2-py3-none-any.whl").write_text("no wheel")
    error = gpu_train.install(tmp_path, tmp_path / "site")["error"]
    assert str(tmp_path) in error


def test_half_a_batch_is_for_both_sides(
    gpu_train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_python: str, _script: str, job: dict[str, int], env: dict[str, str]) -> object:
        is_reference = env["PYTHONPATH"].startswith("theirs")
        fits = job["batch"] <= (2 if is_reference else 4)
        seconds = [2.0] if is_reference else [1.0]
        return {
            "is_out_of_memory": not fits,
            "seconds": seconds,
            "peak_bytes": 100 if is_reference else 25,
            "parameters": 1,
            "loss": 0.0,
        }

    monkeypatch.setattr(gpu_train, "run_worker", run)
    sides = {"mblm": Path("ours"), "reference": Path("theirs")}
    figures = gpu_train.measure({"batch": 4}, sides, runs=2)
    assert figures["batch"] == 2
    assert {side: len(runs) for side, runs in figures["runs"].items()} == dict.fromkeys(sides, 2)
    assert gpu_train.report(figures, 1000) == "2.00 of the reference's bytes/s, 0.25 of its memory"
    assert figures["mblm"]["bytes_per_second"] == 2000


@pytest.mark.parametrize("name", ["pg19_2d_st", "pg19_3d_stt"])
def test_only_stage_1_is_replaced(gpu_train: ModuleType, name: str) -> None:
    arguments = gpu_train.argparse.Namespace(quick=False, steps=1, seconds=1.0)
    published = gpu_train.job_of(name, "mamba2", arguments)
    replaced = gpu_train.job_of(name, "transformer", arguments)
    assert "d_state" in published["model"]["block"][0]
    assert replaced["model"].pop("block") == [published["model"]["block"][-1]] * len(
        published["model"].pop("block")
    )
    assert replaced == published
