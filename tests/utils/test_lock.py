"""A file is held by one at a time, and let go of in whatever way the block ends."""

import dis
import errno
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mblm.utils import lock
from mblm.utils.lock import hold


def test_another_of_this_process_is_refused_and_takes_nothing_away(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("lock")
    with hold(tmp_path / "lock", "taken"):
        for name in ("lock", "link", "lock"):
            with pytest.raises(ValueError, match="taken"), hold(tmp_path / name, "taken"):
                pass


def test_a_file_system_without_locks_keeps_out_this_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", fail)
    file = tmp_path / "lock"
    with hold(file, "taken"), pytest.raises(ValueError, match="taken"), hold(file, "taken"):
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


def test_an_interrupt_at_any_moment_lets_go_of_it(tmp_path: Path) -> None:
    count = 0
    while _is_interrupted(tmp_path / "lock", after_calls=count):
        with hold(tmp_path / "lock", "taken"):
            count += 1
    assert count > 5


def _is_interrupted(path: Path, after_calls: int) -> bool:
    """Hold a file, with an interrupt where Python looks for one after so many calls."""
    code = hold.__wrapped__.__code__  # type: ignore[attr-defined]
    left, last = iter(range(after_calls)), ""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal last
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last = last, dis.opname[code.co_code[frame.f_lasti]]
            if before.startswith("CALL") and next(left, None) is None:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    watching = sys.gettrace()
    sys.settrace(trace)
    try:
        with hold(path, "taken"):
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(watching)
    return False
