"""A file is held by one at a time, and let go of in whatever way the block ends."""

import dis
import sys
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from mblm.utils.lock import hold


def test_another_of_this_process_is_refused_and_takes_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("lock")
    with hold(tmp_path / "lock", "taken"):
        for name in ("lock", "link", "lock"):
            with pytest.raises(ValueError, match="taken"), hold(tmp_path / name, "taken"):
                pass


def test_it_is_let_go_of(tmp_path: Path) -> None:
    for _ in range(2):
        with suppress(KeyboardInterrupt), hold(tmp_path / "lock", "taken"):
            raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), hold(tmp_path / "no folder" / "lock", "taken"):
        pass
    (tmp_path / "no folder").mkdir()
    with hold(tmp_path / "no folder" / "lock", "taken"):
        pass


def test_an_interrupt_before_the_block_lets_go_of_it(tmp_path: Path) -> None:
    code = hold.__wrapped__.__code__  # type: ignore[attr-defined]
    interrupts = 0
    with suppress(StopIteration):
        while True:
            with suppress(KeyboardInterrupt):
                _interrupted(code, interrupts, tmp_path / "lock")
            with hold(tmp_path / "lock", "taken"):
                interrupts += 1
    assert interrupts > 10


def _interrupted(code: CodeType, at: int, path: Path) -> None:
    """Hold a file, with an interrupt at one of the instructions until it is held."""
    left = iter(range(at))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        # Python calls no signal handler at a NOP, which no handler of exceptions covers.
        is_real = event == "opcode" and dis.opname[code.co_code[frame.f_lasti]] != "NOP"
        if is_real and next(left, None) is None:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with hold(path, "taken"):
            sys.settrace(before)
            raise StopIteration
    finally:
        sys.settrace(before)
