"""Any files as one row of bytes, cut into training, validation and test parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mblm.data.dataset.byte_files import ByteFiles, ByteFilesArgs
from mblm.data.deal import Dealer
from mblm.data.types import ModelMode
from tests.data.entry import entry_config

TRAIN, VALID, TEST = ModelMode


def write(folder: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def part(folder: Path, mode: ModelMode, seq_len: int = 1, **arguments: Any) -> ByteFiles:
    args = ByteFilesArgs.model_validate(arguments)
    return ByteFiles(folder, mode, args, seq_len=seq_len, worker_id=0, num_workers=1)


def ids_of(dataset: ByteFiles) -> list[int]:
    return [number for ids, _ in map(dataset.__getitem__, range(len(dataset))) for number in ids]


def text_of(folder: Path, mode: ModelMode, **arguments: Any) -> bytes:
    return bytes(ids_of(part(folder, mode, **arguments)))


def test_a_sample_is_ids_and_a_loss_mask(tmp_path: Path) -> None:
    ids, mask = part(write(tmp_path, a=bytes(range(100, 200))), TRAIN, seq_len=4)[1]
    assert ids.tolist() == [104, 105, 106, 107]
    assert mask.tolist() == [1.0] * 4
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.float16)


def test_by_default_everything_in_the_folder_is_cut_at_90_and_95_percent(tmp_path: Path) -> None:
    write(tmp_path, b=bytes(range(60, 100)), a=bytes(range(60)), **{".c": b"hidden"})
    assert text_of(tmp_path, TRAIN) == bytes(range(90))
    assert text_of(tmp_path, VALID) == bytes(range(90, 95))
    assert text_of(tmp_path, TEST) == bytes(range(95, 100))


def test_the_folder_may_be_a_single_file(tmp_path: Path) -> None:
    write(tmp_path, one=bytes(range(100)), other=b"not read")
    assert text_of(tmp_path / "one", VALID) == bytes(range(90, 95))
    with pytest.raises(ValueError, match="is a file, so files cannot be given"):
        part(tmp_path / "one", TRAIN, files=["other"])


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8),
    valid=st.sampled_from([0.0, 0.05, 0.3]),
    test=st.sampled_from([0.0, 0.1, 0.5]),
    split_by=st.sampled_from(["bytes", "documents"]),
    separator=st.sampled_from([None, 300]),
)
def test_parts_are_disjoint_and_together_complete(
    tmp_path_factory: pytest.TempPathFactory,
    contents: list[bytes],
    valid: float,
    test: float,
    split_by: str,
    separator: int | None,
) -> None:
    # Every byte is told apart by its value, so that a byte in two parts is seen.
    numbers = iter(range(256))
    documents = [bytes(next(numbers) for _ in content) for content in contents]
    folder = write(
        tmp_path_factory.mktemp("files"),
        **{f"{index:02}": document for index, document in enumerate(documents)},
    )
    arguments = {
        "valid_fraction": valid,
        "test_fraction": test,
        "split_by": split_by,
        "separator_id": separator,
    }
    parts = []
    for mode in ModelMode:
        try:
            parts.append(ids_of(part(folder, mode, **arguments)))
        except ValueError as error:
            assert "too small" in str(error)
            parts.append([])
    together = [number for ids in parts for number in ids if number != separator]
    assert sorted(together) == list(b"".join(documents))
    if split_by == "documents":
        for ids in parts:
            inside = [n for index, n in enumerate(ids) if n == separator and 0 < index < len(ids)]
            held = [document for document in documents if document[0] in ids]
            assert [n for n in ids if n != separator] == list(b"".join(held)), "whole documents"
            assert len(inside) == (max(len(held) - 1, 0) if separator else 0)
    else:
        row = [number for ids in parts for number in ids]
        size = sum(map(len, documents)) + (len(documents) - 1 if separator else 0)
        assert [n for n in row if n != separator] == list(b"".join(documents)), "in their order"
        assert [len(ids) for ids in parts[1:]] == [int(size * valid), int(size * test)]


def test_a_separator_stands_between_files(tmp_path: Path) -> None:
    write(tmp_path, a=b"ab", b=b"", c=b"c", d=b"d")
    ids = ids_of(part(tmp_path, TRAIN, separator_id=300, valid_fraction=0, test_fraction=0))
    assert ids == [97, 98, 300, 99, 300, 100]


def test_documents_are_dealt_out_by_their_bytes_from_all_over() -> None:
    shares = {TRAIN: 0.8, VALID: 0.1, TEST: 0.1}
    sizes = [5, 1, 3, 2] * 50
    dealer = Dealer(shares)
    parts = [dealer.deal(size) for size in sizes]
    for mode, share in shares.items():
        got = sum(size for size, to in zip(sizes, parts, strict=True) if to is mode)
        assert abs(got - share * sum(sizes)) <= 5
        assert {index // 50 for index, to in enumerate(parts) if to is mode} == {0, 1, 2, 3}


def test_parts_with_files_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, a=b"aaaa", b=b"bbbb", v=b"vv", t=b"tt")
    arguments = {"valid_files": ["v"], "test_files": ["t"]}
    assert text_of(tmp_path, TRAIN, **arguments) == b"aaaabbbb"
    assert text_of(tmp_path, VALID, **arguments) == b"vv"
    assert text_of(tmp_path, TEST, **arguments) == b"tt"


def test_the_other_part_still_is_a_fraction_of_the_other_files(tmp_path: Path) -> None:
    write(tmp_path, a=b"aaaa", b=b"bbbb", v=b"vv")
    arguments = {"valid_files": ["v"], "test_fraction": 0.25}
    assert text_of(tmp_path, TRAIN, **arguments) == b"aaaabb"
    assert text_of(tmp_path, TEST, **arguments) == b"bb"


def test_loading_processes_read_the_same(tmp_path: Path) -> None:
    data = part(write(tmp_path, a=bytes(range(60)), b=bytes(range(60, 120))), TRAIN, seq_len=7)
    batches = [
        [ids for ids, _ in DataLoader(data, batch_size=3, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert batches[0][0].shape == (3, 7)


def test_nothing_of_another_part_follows_the_last_sample(tmp_path: Path) -> None:
    data = part(write(tmp_path, a=bytes(range(100))), TRAIN, seq_len=40)
    assert data[len(data)][0].tolist() == list(range(80, 90))


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a=bytes(range(100)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_of(Path("~"), TRAIN) == text_of(Path("~/a"), TRAIN) == bytes(range(90))


def train_config(folder: Path, **dataset_args: Any) -> Any:
    return entry_config(folder, dataset_args or None, input_seq_len=5, num_tokens=257)


def test_from_a_training_configuration(tmp_path: Path) -> None:
    config = train_config(write(tmp_path, a=bytes(range(100)), b=b"not read"), files=["a"])
    data = ByteFiles.from_train_entry_config(config, TRAIN, worker_id=1, num_workers=2)
    assert (len(data), data[0][0].tolist()) == (9, [45, 46, 47, 48, 49])
    assert ByteFiles.supports_test_mode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seperator_id": 1}, "seperator_id\n.*not permitted"),
        ({"valid_fraction": 1.0}, "valid_fraction\n.*less than 1"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"valid_files": ["a"], "valid_fraction": 0.1}, "valid_files or valid_fraction, not both"),
        ({"separator_id": -1}, "separator_id\n.*greater than or equal to 0"),
        ({"separator_id": 257}, r"separator_id: expected one in \[0, 257\).*got 257"),
        ({"files": []}, "files\n.*at least 1 item"),
        ({"split_by": "size"}, "split_by\n.*'bytes' or 'documents'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unfit_arguments_are_refused_by_name(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ByteFiles.from_train_entry_config(
            train_config(write(tmp_path, a=bytes(100)), **arguments), TRAIN, 0, 1
        )


def test_what_holds_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"io\.dataset_dir\): no file or folder .*nothing"):
        part(tmp_path / "nothing", TRAIN)
    with pytest.raises(FileNotFoundError, match="files: no file in "):
        part(tmp_path, TRAIN)
    write(tmp_path, a=b"", b=b"")
    with pytest.raises(ValueError, match=r"split by bytes: data_size: 0 is too small"):
        part(tmp_path, TRAIN)


def test_a_part_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a=bytes(100))
    with pytest.raises(ValueError, match=r"split by bytes: data_size: 5 is too"):
        part(tmp_path, VALID, seq_len=6)
    with pytest.raises(ValueError, match=r"split by documents: data_size: 0"):
        part(tmp_path, VALID, split_by="documents")
    with pytest.raises(ValueError, match=r"data_size: 0"):
        part(tmp_path, TEST, test_fraction=0)


def test_a_file_in_two_parts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a=b"a", b=b"b", c=b"c")
    with pytest.raises(ValueError, match=r"test_files: '.*b' is one of valid_files, too"):
        part(tmp_path, TRAIN, valid_files=["b", "c"], test_files=["*[ab]"])


def test_what_runs_write_is_no_data(tmp_path: Path) -> None:
    config = train_config(write(tmp_path, a=bytes(range(100))))
    config.io.output_dir = str(tmp_path / "out" / "put")
    before = ByteFiles.from_train_entry_config(config, TRAIN, 0, 1)
    (tmp_path / "out" / "put").mkdir(parents=True)
    write(tmp_path / "out" / "put", model=b"weights")
    after = ByteFiles.from_train_entry_config(config, TRAIN, 0, 1)
    assert ids_of(after) == ids_of(before)
    config.io.output_dir = str(tmp_path / "out" / "..")
    with pytest.raises(ValueError, match=r"io.output_dir: expected another folder than io.dataset"):
        ByteFiles.from_train_entry_config(config, TRAIN, 0, 1)


def test_its_lineage_is_the_files_wherever_the_folder_is(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "moved"):
        (folder / "in").mkdir(parents=True)
        write(folder, b=bytes(60))
        write(folder / "in", a=bytes(40))
        files = ["in", "b"]
        sources = [("in/a", 40), ("b", 60)]
        assert part(folder, TRAIN, files=files).lineage() == sources
    assert part(tmp_path / "b", TEST).lineage() == [("b", 60)]
