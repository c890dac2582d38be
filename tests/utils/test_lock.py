"""A file is held by one at a time, and let go of in whatever way the block ends."""

import errno
from contextlib import suppress
from pathlib import Path

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


def test_a_file_that_its_holder_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while another had it: a third may hold a new one by the same name."""
    file = tmp_path / "lock"
    monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: file.unlink())
    with pytest.raises(ValueError, match="taken"), hold(file, "taken"):
        pass
    monkeypatch.undo()
    with hold(file, "taken"):
        pass
