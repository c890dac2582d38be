"""Curves of runs: what is read from loss.csv, what is refused, and that a picture comes out."""

import math
import sys
from pathlib import Path

import pytest

from mblm.train.plot import plot, read_curves

HEADER = (
    "gpu_rank,timestamp,elements_seen,kind,epoch,batch,cum_batch,loss,lr,avg_grad,avg_grad_clipped"
)
NAT = 1 / math.log(2)


def run(folder: Path, *rows: str) -> Path:
    folder.mkdir()
    (folder / "loss.csv").write_text("\n".join([HEADER, *rows, ""]))
    return folder


def row(kind: str, seen: int, loss: object, rank: int = 0, lr: float = 0.5) -> str:
    return f"{rank},2026-01-01,{seen},{kind},0,1,1,{loss},{lr},0,0"


def test_reads_bits_per_byte_and_learning_rates(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "one",
        row("train", 10, 2.0, lr=0.1),
        row("valid", 10, 1.0, lr=-1),
        row("train", 20, 1.0, lr=0.2),
        row("test", -1, 1.0, lr=-1),
    )
    for given in (folder, str(folder), folder / "loss.csv"):
        curves = read_curves(given)
        assert curves.name == "one"
        assert curves.train == [(10, 2 * NAT), (20, NAT)]
        assert curves.valid == [(10, NAT)]
        assert curves.learning_rate == [(10, 0.1), (20, 0.2)]


METRICS = (
    "cum_batch,kind,elements_seen,seconds,loss,lr,gradient_norm,elements_per_second,waiting,"
    "memory_max"
)


def test_metrics_come_before_losses_and_tell_time_and_speed(tmp_path: Path) -> None:
    """Training goes on in another process after the second row, which counts from 0 again."""
    folder = run(tmp_path / "one", row("train", 10, 9.0))
    rows = (
        "3,train,100,5,2.0,0.1,1,20,0,1",
        "3,valid,100,8,1.0,,,,,",
        "7,train,200,4,1.0,0.2,1,25,0,1",
    )
    (folder / "metrics.csv").write_text("\n".join([METRICS, *rows, "9,tra"]))
    curves = read_curves(folder)
    assert curves.train == [(100, 2 * NAT), (200, NAT)]
    assert curves.valid == [(100, NAT)]
    assert curves.learning_rate == [(100, 0.1), (200, 0.2)]
    assert curves.speed == [(100, 20), (200, 25)]
    assert curves.seconds == [(100, 5), (100, 8), (200, 12)]
    assert curves.by_time(curves.train) == [(8 / 60, 2 * NAT), (12 / 60, NAT)]
    assert str(curves) == "one: at best 1.443 bits per byte, 200 bytes in 0.2 minutes"


def test_of_losses_alone_time_and_speed_are_those_of_the_clock(tmp_path: Path) -> None:
    """It stands still while the clock is set back, as at the end of summer time."""
    times = {10: "02:59:10", 30: "02:59:30", 40: "02:00:00", 60: "02:00:10"}
    rows = [row("train", n, 1.0).replace("01-01", f"10-25 {time}") for n, time in times.items()]
    curves = read_curves(run(tmp_path / "one", *rows))
    assert curves.seconds == [(10, 0), (30, 20), (40, 20), (60, 30)]
    assert curves.speed == [(30, 1), (60, 2)]


def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", row("train", 10, 2, rank=1), row("train", 10, 3, rank=0))
    assert read_curves(folder).train == [(10, 2 * NAT)]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_draws_one_picture_of_several_runs(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    runs = [
        run(tmp_path / "a", *(row("train", n, 1 / n) for n in range(1, 9)), row("valid", 8, 0.2)),
        run(tmp_path / "b", row("valid", 5, 1.0)),
        run(tmp_path / "c"),
    ]
    told = plot(runs, tmp_path / f"out{suffix}")
    assert str(told[2]) == "c: no losses yet"
    starts = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert (tmp_path / f"out{suffix}").read_bytes().startswith(starts[suffix])


def test_runs_without_losses_are_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="a: no losses yet, b: no losses yet"):
        (begun := run(tmp_path / "b") / "loss.csv").write_text("")
        plot([run(tmp_path / "a"), begun], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import resource

    out = tmp_path / "out.png"
    out.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"out\.png"):
            plot([run(tmp_path / "a", row("train", 1, 1))], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"before"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "no column elements_seen, kind, loss, lr, timestamp"),
        (f"{HEADER}\n{row('train', 1, 'much')}\n", "line 2: not a row of losses"),
        (f"{HEADER}\n{row('train', 1, 1)}\n0,2026\n", "line 3: not a row of losses"),
    ],
    ids=["other table", "no number", "cut off"],
)
def test_refuses_what_are_no_losses(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loss.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_curves(tmp_path)


def test_says_that_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'mblm\[plot\]'"):
        plot([run(tmp_path / "a", row("train", 1, 1))], tmp_path / "out.png")
