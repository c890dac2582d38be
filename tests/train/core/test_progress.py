"""Progress: lines without a terminal, a bar on one, and bits per byte of bytes."""

import io
import math
import sys

import pytest
import torch

from mblm.train.core import telling
from mblm.train.core.interrupt import TrainingInterrupted
from mblm.train.core.telling import Progress

from . import jobs


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    return now


def test_lines_now_and_then_and_in_the_end(clock):
    lines = []
    with Progress(4, 60, unit="byte", bar=False, say=lines.append) as shown:
        for seconds in (1000, 40, 40, 40):  # the first batch says nothing of the others
            clock[0] += seconds
            shown.update(torch.tensor(2 * math.log(2)))
    assert lines == [
        " 25% 2.000 bits per byte",
        " 75% 2.000 bits per byte, 2 bytes/s, 00:40 left",
        "100% 2.000 bits per byte, 2 bytes/s, 00:00 left",
    ]


def test_a_run_that_goes_on_begins_where_it_was(clock):
    lines = []
    with Progress(10, 60, done=7, unit="byte", bar=False, say=lines.append) as shown:
        for _ in range(3):
            clock[0] += 60
            shown.update(torch.tensor(math.log(2)))
    assert lines == [
        " 80% 1.000 bits per byte",
        " 90% 1.000 bits per byte, 1 bytes/s, 01:00 left",
        "100% 1.000 bits per byte, 1 bytes/s, 00:00 left",
    ]


def test_other_elements_have_a_loss(clock):
    lines = []
    with Progress(2, 8, unit="element", bar=False, say=lines.append) as shown:
        for _ in range(2):
            clock[0] += 2
            shown.update(torch.tensor(1.5))
    assert lines == [" 50% loss 1.5000", "100% loss 1.5000, 4 elements/s, 00:00 left"]


def test_a_bar(clock, capsys):
    with Progress(4, 8, unit="byte", bar=True, say=pytest.fail) as shown:
        for _ in range(2):
            clock[0] += 3600
            shown.update(torch.tensor(math.log(2)))
    assert "50% |" in (shown_text := capsys.readouterr().err)
    assert "1.000 bits per byte, 0 bytes/s, 2:00:00 left" in shown_text


def test_a_loss_that_is_not_finite_is_forgotten(clock):
    lines = []
    with Progress(2, 8, unit="element", bar=False, say=lines.append) as shown:
        for loss in (math.nan, 1.0):
            clock[0] += 60
            shown.update(torch.tensor(loss))
    assert "loss nan" in lines[0]
    assert "loss 1.0000" in lines[1]


@pytest.mark.parametrize("stops", [True, False])
def test_a_reader_that_leaves_ends_no_run(tmp_path, monkeypatch, stops):
    """As `tee` does that Ctrl-C ends, too: the run still saves and says so by its status."""

    class Left(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Left())
    if stops:
        monkeypatch.setattr(jobs.StopsItself, "stop_in", 5)
        with pytest.raises(TrainingInterrupted):
            jobs.train_alone(jobs.StopsItself, jobs.config(tmp_path))
    else:
        jobs.train_alone(jobs.Trainer, jobs.config(tmp_path))
