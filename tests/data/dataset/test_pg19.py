"""PG19: a folder of books for each part, read as one row of bytes."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from mblm.data.dataset.pg19 import PG19
from mblm.data.types import ModelMode
from tests.data.entry import entry_config

ALONE = {"worker_id": 0, "num_workers": 1}


@pytest.fixture
def books(tmp_path: Path) -> Path:
    for part in ("train", "validation", "test"):
        (tmp_path / part).mkdir()
        for name in ("1.txt", "2.txt", "3.txt"):
            (tmp_path / part / name).write_text(
                f"{part} {name}\r\né" * 5, encoding="utf8", newline=""
            )
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "folder"),
    [(ModelMode.TRAIN, "train"), (ModelMode.VALID, "validation"), (ModelMode.TEST, "test")],
)
def test_samples_are_the_bytes_of_the_books_of_a_part(
    books: Path, mode: ModelMode, folder: str
) -> None:
    data = PG19(books, mode, seq_len=20, **ALONE)
    row = b"".join(file.read_bytes() for file in data.txt_files)
    assert {file.parent for file in data.txt_files} == {books / folder}
    assert data.txt_files == sorted(data.txt_files)
    assert len(data) == len(row) // 20
    for index in range(len(data)):
        ids, mask = data[index]
        assert bytes(ids.tolist()) == row[20 * index : 20 * index + 20]
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.float16)
        assert mask.tolist() == [1.0] * 20


def test_hidden_files_are_no_books(books: Path) -> None:
    before = PG19(books, ModelMode.TRAIN, seq_len=20, **ALONE).data[:]
    (books / "train" / ".DS_Store").write_bytes(b"hidden")
    assert torch.equal(PG19(books, ModelMode.TRAIN, seq_len=20, **ALONE).data[:], before)


def test_from_a_training_configuration(books: Path) -> None:
    config = entry_config(books, input_seq_len=10)
    data = PG19.from_train_entry_config(config, ModelMode.VALID, worker_id=1, num_workers=3)
    assert (data.seq_len, len(data)) == (10, len(data.data) // 3 // 10)
    assert PG19.supports_test_mode()


def test_books_are_text(books: Path) -> None:
    data = PG19(books, ModelMode.TEST, seq_len=7, **ALONE)
    assert data.book("2.txt") == "test 2.txt\né" * 5
    assert dict(data.iter_books()) == {
        name: data.book(name) for name in ("1.txt", "2.txt", "3.txt")
    }
    assert [name for name, _ in data.iter_books()] == [file.name for file in data.txt_files]
    assert sorted(data.iter_books(shuffle=True)) == sorted(data.iter_books())
    with pytest.raises(ValueError, match=r"name: no book '4\.txt' among 3"):
        data.book("4.txt")


@pytest.mark.parametrize("seq_len", [10, 224, 225])
def test_random_sequences_come_from_anywhere(books: Path, seq_len: int) -> None:
    data = PG19(books, ModelMode.TRAIN, seq_len=seq_len, **ALONE)
    assert len(data.data) == 225
    random.seed(1)
    row = bytes(data.data[:].tolist())
    for ids in itertools.islice(data.iter_sequences_rand(), 20):
        assert ids.dtype == torch.uint8
        assert len(ids) == seq_len
        assert bytes(ids.tolist()) in row


def test_what_holds_no_books_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_dir: no folder .*validation"):
        PG19(tmp_path, ModelMode.VALID, seq_len=1, **ALONE)
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match=r"data_dir: no books in .*validation"):
        PG19(tmp_path, ModelMode.VALID, seq_len=1, **ALONE)
    (tmp_path / "validation" / "folder").mkdir()
    with pytest.raises(ValueError, match=r"validation/folder' is no file"):
        PG19(tmp_path, ModelMode.VALID, seq_len=1, **ALONE)


def test_its_lineage_is_the_books(books: Path) -> None:
    size = len("train 1.txt\r\né".encode()) * 5
    lineage = PG19(books, ModelMode.TRAIN, seq_len=20, **ALONE).lineage()
    assert lineage == [("1.txt", size), ("2.txt", size), ("3.txt", size)]
