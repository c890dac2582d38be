"""atomic_write: the old file or the new one, never a part, and nothing left beside it."""

import errno
import os
import stat

import pytest

from mblm.utils.atomic import atomic_write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_creates_a_file_with_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path) == ["file", "plain"]


def test_the_old_file_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with atomic_write(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path, error, exists):
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of")
        raise error
    assert names(tmp_path) == (["file"] if exists else [])
    assert not exists or path.read_bytes() == b"old"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_error_of_the_system_leaves_everything_as_it_was(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"), atomic_write(path) as file:
        file.write(b"new")
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_the_bytes_are_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(f"sync {kind}")
        fsync(descriptor)

    def record_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert calls == ["sync file", "rename", "sync folder"]


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_refuses_what_is_no_file_or_has_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="not a regular file"), atomic_write(path):
            pytest.fail("opened")
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError, match=r"No such folder.*missing"), atomic_write(path):
        pytest.fail("opened")


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    with (
        pytest.raises(OSError, match=r"No space left on device: .*config\.yaml"),
        atomic_write(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
