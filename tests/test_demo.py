"""The demonstration: the sources it reads, how it trains, what it leaves."""

import math
import sys
from pathlib import Path

import pytest
import torch

from mblm import MBLM
from mblm.cli import main
from mblm.demo import (
    BATCH_SIZE,
    FILTER_THRES,
    LENGTH,
    TEMPERATURE,
    find_sources,
    train_demo,
)
from tests import fresh
from tests.cli.program import Run


def test_trains_saves_and_writes(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    flags = ["--minutes", "0.01", "--out", str(out), "--bytes", "20", "--prompt", "def "]
    monkeypatch.setattr(sys, "argv", ["mblm", "demo", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    written, told = capfdbinary.readouterr()
    assert stopped.value.code == 0
    for said in ("too few to learn much", "Bits per byte", "bytes/s"):
        assert said in told.decode()
    assert told.startswith(b"What the model `python` writes, which comes with this package:\n")

    model = MBLM.from_pretrained(out)
    assert not torch.equal(model.to_logits.weight, MBLM(model.config).to_logits.weight)
    ids = model.generate(
        torch.tensor(list(b"def ")),
        num_tokens_to_generate=20,
        filter_thres=FILTER_THRES,
        temperature=TEMPERATURE,
        seed=0,
        enable_progress=False,
    )
    assert written == bytes(i for i in ids.tolist() if i < 256)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_refuses_a_time_that_is_none(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="minutes: expected a positive number"):
        train_demo(seconds, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_says_so_before_anything_is_written(run: Run) -> None:
    done = run("demo", "--minutes", "-1")
    assert done.status == 2 and done.out == b"" and "--minutes" in done.error


def test_refuses_a_file_as_folder_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        train_demo(3600, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_sources_are_split_by_file(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"m{number}.py").write_text("x = 1\n" * 300)
    (tmp_path / "data.txt").write_text("text")
    for name in ("test", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left_out.py").write_text("x = 1\n")
    training, validation = find_sources(tmp_path)
    assert (len(training), len(validation)) == (38, 2)
    assert sorted(training + validation) == sorted(f"m{number}.py" for number in range(40))
    assert find_sources(tmp_path) == (training, validation)


@pytest.mark.parametrize("count", [0, 1, 19])
def test_refuses_a_folder_without_sources(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / f"m{number}.py").write_text("x" * (BATCH_SIZE * LENGTH // 20))
    with pytest.raises(ValueError, match="no sources of the standard library"):
        find_sources(tmp_path)


def test_an_interrupt_leaves_nothing_and_says_nothing_of_a_saved_state(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "import mblm.demo\n"
        "from mblm.cli import main\n"
        "forward = mblm.train.mblm.MegabyteTrainer.model_forward\n"
        "def interrupted(self, *arguments):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    return forward(self, *arguments)\n"
        "mblm.train.mblm.MegabyteTrainer.model_forward = interrupted\n"
        "mblm.demo.show_packaged = lambda: None\n"
        f"sys.argv = ['mblm', 'demo', '--out', {str(tmp_path / 'demo')!r}]\n"
        "main()"
    )
    done = fresh.run(code, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "")
    left = {file.name for file in tmp_path.iterdir()}
    assert {name for name in left if not name.startswith("torchinductor")} == {"demo"}
