"""A packed folder holds every document in its order, whole or not at all, and is read back."""

import gzip
import json
import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mblm.data.dataset.byte_files import ByteFiles, ByteFilesArgs
from mblm.data.pack import pack
from mblm.data.packed import open_part, read_summary
from mblm.data.types import ModelMode

TRAIN, VALID, TEST = ModelMode


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """A table of two hundred rows."""
    return write(tmp_path / "posts.jsonl", [f"post {n};" for n in range(200)])


def documents(folder: Path, mode: ModelMode) -> list[bytes]:
    """The documents of a part, as another program reads them."""
    data = (folder / mode.value / "bytes.bin").read_bytes()
    offsets = np.load(folder / mode.value / "documents.npy").tolist()
    return [data[start:end] for start, end in pairwise(offsets)]


def is_clean(tmp_path: Path) -> bool:
    """Whether packing has left nothing."""
    return {path.name for path in tmp_path.iterdir()} == {"posts.jsonl"}


def test_documents_stand_in_their_order_with_a_share_to_validate_on(posts: Path) -> None:
    out = posts.parent / "out" / "packed"
    summary = pack([str(posts)], out, valid=0.1)
    train, valid = documents(out, TRAIN), documents(out, VALID)
    assert sorted(train + valid) == sorted(f"post {n};".encode() for n in range(200))
    for part in (train, valid):
        numbers = [int(document[5:-1]) for document in part]
        assert numbers == sorted(numbers)
    assert len(valid) == 20 and int(valid[0][5:-1]) < 20 and int(valid[-1][5:-1]) > 180
    assert read_summary(out) == summary
    assert (summary.parts["train"].documents, summary.parts["valid"].documents) == (180, 20)
    size = posts.stat().st_size - 200 * len('{"text": ""}\n')
    assert sum(part.bytes for part in summary.parts.values()) == size


def test_names_are_texts_or_paths_and_sources_a_list(posts: Path) -> None:
    out = posts.parent / "packed"
    summary = pack([posts], str(out))
    assert read_summary(str(out)) == summary
    assert open_part(str(out), TRAIN).sizes == open_part(out, TRAIN).sizes
    for one in (posts, str(posts)):
        with pytest.raises(TypeError, match="sources: expected a list of names, got"):
            pack(one, out)  # type: ignore[arg-type]


def test_packing_again_gives_the_same(posts: Path) -> None:
    first, second = (pack([str(posts)], posts.parent / name) for name in ("first", "second"))
    assert first == second
    for file in ("train/bytes.bin", "valid/documents.npy", "pack.json"):
        a, b = ((posts.parent / name / file).read_bytes() for name in ("first", "second"))
        assert a == b


def test_the_summary_counts_sources_and_what_is_left_out(posts: Path) -> None:
    other = posts.with_name("other.jsonl")
    write(other, ["", "good", "", "\ud800"])
    summary = pack([str(posts), str(other)], posts.parent / "packed", valid=0)
    assert summary.left_out == {"empty": 2, "not Unicode": 1}
    assert summary.parts["train"].sources[str(other)] == 4
    assert list(summary.parts) == ["train"]


def read_part(folder: Path, mode: ModelMode, seq_len: int = 4, **arguments: Any) -> ByteFiles:
    args = ByteFilesArgs.model_validate(arguments)
    return ByteFiles(folder, mode, args, seq_len=seq_len, worker_id=0, num_workers=1)


def test_a_packed_folder_is_a_dataset_of_two_parts(posts: Path) -> None:
    out = posts.parent / "packed"
    pack([str(posts)], out, valid=0.1)
    for mode in (TRAIN, VALID):
        data = read_part(out, mode)
        ids = [i for index in range(len(data)) for i in data[index][0].tolist()]
        assert bytes(ids) == b"".join(documents(out, mode))[: len(ids)]
    with pytest.raises(ValueError, match="was packed without a test part"):
        read_part(out, TEST)
    with pytest.raises(ValueError, match=r"documents.npy' is of a packed folder: train on that"):
        read_part(posts.parent, TRAIN)
    with pytest.raises(ValueError, match=r"documents.npy' is of a packed folder: train on that"):
        pack([str(out)], posts.parent / "again")
    with pytest.raises(ValueError, match=r"valid_fraction: .* is packed and has its own parts"):
        read_part(out, TRAIN, valid_fraction=0.1)


def test_samples_may_start_at_documents(tmp_path: Path) -> None:
    texts = ["abcdef", "gh", "ijkl", "m", "nopqrst"]
    pack([str(write(tmp_path / "a.jsonl", texts))], tmp_path / "packed", valid=0)

    def samples(**arguments: Any) -> list[list[int]]:
        data = read_part(tmp_path / "packed", TRAIN, 4, **arguments)
        return [data[index][0].tolist() for index in range(len(data))]

    expected = [b"abcd", b"efgh", b"ghij", b"ijkl", b"mnop", b"nopq"]
    assert samples(sample_starts="documents") == [list(text) for text in expected]
    expected = [b"abcd", b"ef|g", b"gh|i", b"ijkl", b"m|no", b"nopq"]
    assert samples(sample_starts="documents", separator_id=124) == [list(t) for t in expected]
    assert samples() == [list(b"abcd"), list(b"efgh"), list(b"ijkl"), list(b"mnop"), list(b"qrst")]


def test_its_lineage_tells_the_file_by_its_bytes_and_its_sources(posts: Path) -> None:
    other = write(posts.with_name("other.jsonl"), ["good", "better"])
    out = posts.parent / "packed"
    summary = pack([str(posts), str(other)], out, valid=0)
    sha256 = summary.parts["train"].sha256[:12]
    files = read_part(out, TRAIN).lineage()
    assert files[1] == (f"train/bytes.bin ({sha256}) of {other}", 10)
    assert sum(size for _, size in files) == summary.parts["train"].bytes


UNFIT = r"documents.npy' does not fit bytes.bin and pack.json: pack again"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train/documents.npy", lambda file: np.save(file, np.load(file)[::-1]), UNFIT),
        ("train/documents.npy", lambda file: file.write_bytes(b""), UNFIT),
        ("train/documents.npy", lambda file: np.save(file, np.int64(7)), UNFIT),
        ("train/bytes.bin", lambda file: os.truncate(file, file.stat().st_size - 1), UNFIT),
        ("pack.json", lambda file: file.write_text('{"parts": 1}'), r"pack.json: 2 mistakes"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    posts: Path, file: str, damage: Any, message: str
) -> None:
    pack([str(posts)], posts.parent / "packed", valid=0)
    damage(posts.parent / "packed" / file)
    with pytest.raises(ValueError, match=message):
        read_part(posts.parent / "packed", TRAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 1.0}, r"valid: expected a share in \[0, 1\), got 1.0"),
        ({"valid": float("nan")}, r"valid: expected a share in \[0, 1\), got nan"),
        ({"field": "body"}, r"posts.jsonl, row 1: no field 'body', only 'text'"),
        ({"valid": 1e-6}, r"valid: 1e-06 of the bytes leaves the valid part none of 200 documents"),
    ],
)
def test_what_cannot_be_packed_leaves_nothing(
    posts: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack([str(posts)], posts.parent / "packed", **options)
    assert is_clean(posts.parent)


def test_an_empty_source_is_refused_by_name(posts: Path) -> None:
    posts.write_text('{"text": ""}\n{"text": null}\n')
    message = r"posts.jsonl: holds no document, 1 are empty, 1 are null"
    with pytest.raises(ValueError, match=message):
        pack([str(posts)], posts.parent / "packed")
    assert is_clean(posts.parent)
    with pytest.raises(ValueError, match=r"posts.jsonl' is given twice, by '.*' and '.*/\*'"):
        pack([str(posts), f"{posts.parent}/*"], posts.parent / "packed")
    with pytest.raises(ValueError, match=r"posts.jsonl' is given twice"):
        pack([str(posts), str(posts)], posts.parent / "packed")


def test_an_archive_that_breaks_in_the_middle_leaves_nothing(posts: Path) -> None:
    archive = gzip.compress(posts.read_bytes())
    posts.with_name("cut.jsonl.gz").write_bytes(archive[: len(archive) * 2 // 3])
    sources = [str(posts), str(posts.with_name("cut.jsonl.gz"))]
    with pytest.raises(ValueError, match=r"cut.jsonl.gz.*: cannot be read: Compressed file ended"):
        pack(sources, posts.parent / "packed")
    posts.with_name("cut.jsonl.gz").unlink()
    assert is_clean(posts.parent)


def test_an_interrupt_leaves_nothing(posts: Path) -> None:
    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([str(posts)], posts.parent / "packed", on_read=interrupt)
    assert is_clean(posts.parent)


def test_a_full_disk_is_one_error_and_leaves_nothing(posts: Path) -> None:
    write(posts, ["x" * 1000] * 2000)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*packed'"):
            pack([str(posts)], posts.parent / "packed", valid=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert is_clean(posts.parent)


def test_what_a_killed_pack_left_is_cleared_and_a_folder_is_never_replaced(posts: Path) -> None:
    left = posts.parent / ".packed.tmp" / "train"
    left.mkdir(parents=True)
    (left / "bytes.bin").write_bytes(b"half")
    (left.parent / "pack.json").write_bytes(b"{")
    pack([str(posts)], posts.parent / "packed")
    assert not left.parent.exists()
    assert sorted(path.name for path in (posts.parent / "packed").iterdir()) == [
        "pack.json", "train", "valid"
    ]  # fmt: skip
    with pytest.raises(FileExistsError, match="packed exists already: remove it, or name another"):
        pack([str(posts)], posts.parent / "packed")


HOLD = """
import sys
from pathlib import Path
from mblm.utils.lock import hold
with hold(Path(sys.argv[1]), ""):
    print(flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_pack_into_one_folder(posts: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(posts.parent / ".packed.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="packed: it is being packed into already"):
            pack([str(posts)], posts.parent / "packed")
        other.stdin.close()
