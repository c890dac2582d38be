"""A file is held by one at a time, and let go of in whatever way the block ends."""

from contextlib import suppress
from pathlib import Path

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
