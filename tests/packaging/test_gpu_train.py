"""benchmarks/gpu_train.py where there is no GPU: what it says of a reference, and its ratios."""

from pathlib import Path

import gpu_train
import pytest


@pytest.mark.parametrize(
    ("wheel", "error"),
    [
        (None, "it takes mblm==0.4.2, megabyte-pytorch, einops, beartype, mambapy"),
        ("mblm-0.4.1-py3-none-any.whl", "missing: mblm==0.4.2"),
        ("mblm-0.4.2-py3-none-any.whl", "pip does not install"),
    ],
    ids=["none", "another-release", "no-wheel"],
)
def test_says_why_there_is_no_reference(tmp_path: Path, wheel: str | None, error: str) -> None:
    if wheel:
        (tmp_path / wheel).touch()
    assert error in gpu_train.install(tmp_path, tmp_path / "site")["error"]


def test_half_a_batch_is_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_only_stage_1_is_replaced(name: str) -> None:
    arguments = gpu_train.argparse.Namespace(quick=False, steps=1, seconds=1.0)
    published = gpu_train.job_of(name, "mamba2", arguments)
    replaced = gpu_train.job_of(name, "transformer", arguments)
    assert "d_state" in published["model"]["block"][0]
    assert replaced["model"].pop("block") == [published["model"]["block"][-1]] * len(
        published["model"].pop("block")
    )
    assert replaced == published
