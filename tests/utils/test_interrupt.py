"""Ctrl-C ends a program at once, or raises, and what was set before comes back."""

import signal

import pytest

from mblm.utils import interrupt
from tests import fresh


def test_ends_without_a_word_and_loses_nothing_that_was_written() -> None:
    code = (
        "import signal\n"
        "from mblm.utils import interrupt\n"
        "with interrupt.ends_at_once():\n"
        "    print('written')\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "print('never')"
    )
    done = fresh.run(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "written\n", "")


def test_raises_within_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt.ends_at_once():
        with pytest.raises(KeyboardInterrupt), interrupt.raises():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_all_handlers_are_as_they_were_if_one_cannot_be_set() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(OSError),
        interrupt.handled([signal.SIGTERM, signal.SIGKILL], lambda *_: None),
    ):
        pytest.fail("SIGKILL is handled")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.ends_at_once(), interrupt.raises():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
