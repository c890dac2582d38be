"""Where tests find the larger set of reference data, and what every test starts from."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from mblm.cli import main
from tests.cli.program import Result, Run

ROOT = Path(__file__).parents[1]

# A shell that runs the tests in the background has them ignore Ctrl-C, and nohup the end of the
# terminal: the processes that tests send these signals would ignore them, too.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (getattr(signal, "SIGHUP", signal.SIGINT), signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def shared_dir() -> Path | None:
    """The folder with golden numbers and corpora: ``MBLM_SHARED``, or beside the checkout."""
    folder = Path(os.environ.get("MBLM_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every later search for garbage, which then is short."""
    gc.collect()
    gc.freeze()


# `torch.manual_seed` keeps the caller's stack for each kind of device that is not there: a
# millisecond a test.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    _seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of reference data; the test is skipped where there is none."""
    folder = shared_dir()
    if folder is None:
        pytest.skip("no reference data: set MBLM_SHARED or put shared/ beside the checkout")
    return folder


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `mblm` in this process."""

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mblm", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfdbinary.readouterr()
        return Result(stopped.value.code or 0, out, err.decode())

    return call
