"""The demonstration: the sources it reads, how it trains, what it leaves."""

import math
import sys
from pathlib import Path

import pytest
import torch

from mblm import MBLM
from mblm.cli import main
from mblm.demo import (
    FILTER_THRES,
    TEMPERATURE,
    _Progress,
    demo_config,
    measure,
    read_sources,
    train_demo,
)
from mblm.inference.session import Session


def test_trains_saves_and_writes(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    flags = ["--minutes", "0.05", "--out", str(out), "--bytes", "20", "--prompt", "def "]
    monkeypatch.setattr(sys, "argv", ["mblm", "demo", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    written, told = capfdbinary.readouterr()
    assert stopped.value.code == 0
    assert "bits per byte" in told.decode() and "bytes/s" in told.decode()

    model = MBLM.from_pretrained(out)
    assert not torch.equal(model.to_logits.weight, MBLM(demo_config()).to_logits.weight)
    ids = model.generate(
        torch.tensor(list(b"def ")),
        num_tokens_to_generate=20,
        filter_thres=FILTER_THRES,
        temperature=TEMPERATURE,
        seed=0,
        enable_progress=False,
    )
    assert written == bytes(i for i in ids.tolist() if i < 256)


def test_its_model_may_write_on_and_on() -> None:
    model = MBLM(demo_config()).eval()
    session = Session(model).feed(bytes(range(10)))
    assert session.logits().shape == (1, 257)
    assert model.max_length is None


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_refuses_a_time_that_is_none(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="minutes: expected a positive number"):
        train_demo(seconds, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_refuses_a_file_as_folder_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        train_demo(3600, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_sources_are_split_by_file(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"m{number}.py").write_text(f"<{number}>" * 300)
    (tmp_path / "data.txt").write_text("<99>")
    for name in ("test", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left_out.py").write_text("<99>")
    training, validation = (bytes(part.tolist()) for part in read_sources(tmp_path))
    assert sum(f"<{n}>".encode() in training for n in range(40)) == 38
    assert sum(f"<{n}>".encode() in validation for n in range(40)) == 2
    assert not any(f"<{n}>".encode() in training and f"<{n}>".encode() in validation
                   for n in range(40))  # fmt: skip
    assert b"<99>" not in training + validation
    assert read_sources(tmp_path)[0].tolist() == list(training)


def test_refuses_a_folder_without_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sources of the standard library"):
        read_sources(tmp_path)


def test_measures_an_untrained_model_near_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mblm.demo.VALIDATION_SEQUENCES", 4)
    model = MBLM(demo_config()).eval()
    torch.nn.init.zeros_(model.to_logits.weight)
    torch.nn.init.zeros_(model.to_logits.bias)
    text = torch.randint(0, 256, (2000,), dtype=torch.uint8)
    assert measure(model, text) == pytest.approx(math.log2(257), rel=1e-5)


class _Terminal:
    """Keeps what is written, as a terminal does."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self.text = ""
        self.encoding = "utf-8"

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    terminal = _Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with _Progress(1000) as progress:
        for _ in range(3):
            progress.show(2.5, 1000)
    assert "2.50 bits per byte" in terminal.text and "1000 s left" in terminal.text
    assert ("\r" in terminal.text) == is_terminal
    assert is_terminal or terminal.text.count("\n") == 1  # the next is due after ten seconds
