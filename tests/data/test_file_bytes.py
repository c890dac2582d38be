"""Many files read like one row of bytes, and only what is asked for is read."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.data.file_bytes import FileBytes
from tests import fresh


def write(folder: Path, *contents: bytes) -> list[Path]:
    files = [folder / str(index) for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(st.binary(max_size=6), max_size=8),
    separator=st.sampled_from([None, 7, 300]),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    in_one=st.booleans(),
)
def test_reading_is_slicing_the_files_in_a_row(
    tmp_path_factory: pytest.TempPathFactory,
    contents: list[bytes],
    separator: int | None,
    start: int,
    length: int,
    in_one: bool,
) -> None:
    """Whether documents are files or, as packed, in one and told apart by where they start."""
    row: list[int] = []
    for content in filter(None, contents):
        row += [separator] * (separator is not None and row != []) + list(content)
    starts = None
    if in_one:
        sizes = [0, *(len(content) for content in contents if content)]
        starts, contents = np.cumsum(sizes)[:-1], [b"".join(contents)]
    data = FileBytes(write(tmp_path_factory.mktemp("files"), *contents), separator, starts)
    assert len(data) == data.numel() == len(row)

    start = min(start, len(row))
    ids = data.read(start, start + length)
    assert ids.tolist() == row[start : start + length]
    assert ids.dtype == torch.int64


def test_slices_are_those_of_a_tensor(tmp_path: Path) -> None:
    data = FileBytes(write(tmp_path, b"abc", b"", b"defgh"))
    tensor = torch.tensor(list(b"abcdefgh"), dtype=torch.uint8)
    for taken in (slice(None), slice(1, 5), slice(-3, None), slice(None, None, 3), slice(5, 2)):
        assert torch.equal(data[taken], tensor[taken])
    assert [int(data[index]) for index in (0, 3, -1)] == list(b"adh")
    assert data[:2].dtype == torch.uint8
    for index in (8, -9):
        with pytest.raises(IndexError):
            data[index]


def test_another_default_device_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with torch.device("meta"):
        ids = FileBytes([tmp_path / "a"]).read(1, 3)
    assert ids.tolist() == list(b"bc")


def test_a_separator_above_255_needs_a_wider_dtype(tmp_path: Path) -> None:
    data = FileBytes(write(tmp_path, b"ab", b"c"), separator_id=300)
    assert data[:].tolist() == [97, 98, 300, 99]
    assert data[:].dtype == torch.int64


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (4, 5)])
def test_reading_outside_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        FileBytes(write(tmp_path, b"abc")).read(start, stop)


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileBytes, "MAX_OPEN", 3)
    data = FileBytes(write(tmp_path, *[bytes([index]) for index in range(20)]))
    opened = data._opened
    for _ in range(2):
        assert data[:].tolist() == list(range(20))
        assert [file.name for file in opened] == ["17", "18", "19"]
    assert data[18:19].tolist() == [18]
    assert [file.name for file in opened] == ["17", "19", "18"], "the one used last stays longest"


def test_it_is_sent_to_processes_without_its_open_files(tmp_path: Path) -> None:
    data = FileBytes(write(tmp_path, b"ab", bytes(100_000)))
    assert int(data[50_000]) == 0
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    assert pickle.loads(sent)[:3].tolist() == [97, 98, 0]


def test_the_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, b"abc")
    monkeypatch.chdir(tmp_path)
    data = FileBytes([Path("0")])
    monkeypatch.chdir("/")
    assert data[:].tolist() == list(b"abc")


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, b"abc", bytes(100_000))
    data = FileBytes(files)
    assert len(data[:]) == 100_003
    os.truncate(files[1], 5000)
    assert len(data[:5003]) == 5003
    with pytest.raises(ValueError, match="1' had 100000 bytes and now has 5000"):
        data[:]
    with pytest.raises(ValueError, match="1' had 100000 bytes and now has 5000"):
        data[99_000:]


def test_a_file_may_be_deleted_or_replaced_while_it_is_open(tmp_path: Path) -> None:
    files = write(tmp_path, b"abc", b"def", b"other")
    data = FileBytes(files[:2])
    with files[0].open("ab") as file:  # or grow
        file.write(b"more")
    files[0].unlink()
    files[2].replace(files[1])
    assert data[:].tolist() == list(b"abcdef")


def test_a_file_that_is_opened_again_must_have_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileBytes, "MAX_OPEN", 1)
    files = write(tmp_path, b"abc", b"def")
    data = FileBytes(files)
    files[0].write_bytes(b"abcd")
    with pytest.raises(ValueError, match="0' had 3 bytes and now has 4"):
        data[0]


def test_a_system_without_reads_from_a_place_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pread")  # as on Windows
    data = FileBytes(write(tmp_path, b"abc", b"defg"))
    assert [bytes(data[start:6].tolist()) for start in (1, 4, 0)] == [b"bcdef", b"ef", b"abcdef"]


def test_a_system_may_read_less_than_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 3), at))
    assert FileBytes(write(tmp_path, b"abcdefgh"))[1:8].tolist() == list(b"bcdefgh")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FileBytes(write(tmp_path, b"abc"))

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/0'"):
        data[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_closed_with_it(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    data = FileBytes(write(tmp_path, b"abc", b"def"))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    del data
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        FileBytes([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="is no file"):
        FileBytes([tmp_path])


GIGABYTES = 6
MEASURE = """
import sys
from mblm.data.types import ModelMode
from mblm.data.dataset.byte_files import ByteFiles

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1])

before = peak()
data = ByteFiles(sys.argv[1], ModelMode.TRAIN, seq_len=8192, worker_id=0, num_workers=1)
for index in range(0, len(data), len(data) // 50):
    ids, _ = data[index]
print(len(data), int(ids.sum()), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gigabytes_take_megabytes_of_memory(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as opened:
        opened.truncate(GIGABYTES * 2**30)  # sparse: takes no room on the disk
    samples, total, kilobytes = map(int, fresh.output_of(MEASURE, tmp_path).split())
    assert samples * 8192 > 0.8 * GIGABYTES * 2**30
    assert total == 0
    assert kilobytes < 64 * 1024
