"""Documents of every kind of source come as they stand, or an error says where they do not."""

import bz2
import csv
import functools
import gzip
import json
import lzma
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mblm.data.documents import Document, find_source, read_source

# What a library that guesses types would change: numbers, dates, what looks like nothing.
TEXTS = ["first", "0012", "2024-01-01 00:00:00", "NA", "null", "two\nlines, é\r\n", '"quoted"']


def read(name: object, field: str = "text", whole: bool = False) -> list[Document]:
    source = find_source(str(name))
    return list(read_source(source, field, whole=whole, on_read=lambda size: None))


def texts_of(name: object, **options: Any) -> list[str]:
    return [document.data.decode() for document in read(name, **options)]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["id", "text"], *enumerate(TEXTS)])
    return path


def write_parquet(path: Path, columns: dict[str, Any] | None = None) -> Path:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table(columns or {"id": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=3)
    return path


def zstd(data: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def test_rows_of_tables_are_documents_as_they_stand(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"id": 1, "text": text} for text in TEXTS]
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", rows)) == TEXTS
    assert texts_of(write_jsonl(tmp_path / "a.NDJSON", rows)) == TEXTS
    assert texts_of(write_csv(tmp_path / "a.csv")) == TEXTS
    assert texts_of(write_csv(tmp_path / "a.tsv", "\t")) == TEXTS
    assert texts_of(write_parquet(tmp_path / "a.parquet")) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [{"text": text} for text in TEXTS]
    table = write_jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](table))
    (tmp_path / f"image{suffix}").write_bytes(COMPRESS[suffix](b"\xff\x00any"))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == TEXTS
    assert read(tmp_path / f"image{suffix}") == [Document(b"\xff\x00any")]


def test_any_other_file_of_a_folder_is_one_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "row 1"}, {"text": "row 2"}])
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.txt").write_text("text")
    assert texts_of(tmp_path) == ["{}", "row 1", "row 2", "text"]
    assert texts_of(tmp_path / "*.json") == ["{}"]


def test_tables_can_be_taken_whole(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}, {"body": "y"}])
    assert texts_of(file, whole=True) == [file.read_text()]


def test_another_column_can_be_taken(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert texts_of(file, field="body") == ["yes"]


def test_a_parquet_column_may_hold_bytes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": [b"\xff", b"\x00"]})
    assert [document.data for document in read(tmp_path / "a.parquet")] == [b"\xff", b"\x00"]


def test_a_row_without_a_document_says_why(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": value} for value in ("", None, "\ud800", "good")]
    troubles = [document.trouble for document in read(write_jsonl(tmp_path / "a.jsonl", rows))]
    assert troubles == ["empty", "null", "not Unicode", ""]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl", r"a.jsonl, row 3: no field 'text', only 'id', 'body'"),
        ("a.csv", r"a.csv, row 2: no field 'text', only 'id'"),
        ("a.parquet", r"a.parquet, row 1: no field 'text', only 'id', 'body'"),
    ],
)
def test_a_row_that_lacks_the_field_is_named(tmp_path: Path, name: str, message: str) -> None:
    file = tmp_path / name
    if name == "a.jsonl":
        write_jsonl(file, [{"text": "x"}, {"text": "y"}, {"id": 3, "body": "z"}])
    elif name == "a.csv":
        file.write_text("id,text\n1,x\n2\n")
    else:
        write_parquet(file, {"id": [1], "body": ["x"]})
    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a.jsonl, row 2: cannot be read: Expecting val"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"row 2: expected an object of fields, got list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', r"row 2: 'text' is no text but int"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl: cannot be read: 'utf-8' codec can't decode"),
        ("a.csv", b'text\n"x"\n"y', r"a.csv, row 2: cannot be read: unexpected end of data"),
        ("a.csv", b"text,text\nx,y\n", r"a.csv: cannot be read: there are two columns 'text'"),
        ("a.csv", b"id,text\n1,x\n2,y, and z\n", r"a.csv, row 2: .* more values than there"),
        ("a.parquet", b"no parquet", r"a.parquet: cannot be read: Parquet"),
        ("a.gz", b"no archive", r"a.gz: cannot be read: Not a gzipped file"),
        ("a.zst", b"no archive", r"a.zst: cannot be read: "),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith((".parquet", ".zst")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_archive_that_is_cut_short_is_an_error_in_the_middle(
    tmp_path: Path, suffix: str
) -> None:
    # More than a block of bz2.
    random = Random(0)
    rows = (json.dumps({"text": random.randbytes(1000).hex()}) for _ in range(600))
    whole = COMPRESS[suffix]("\n".join(rows).encode())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(ValueError, match=r"a.jsonl.*, row \d+: cannot be read: "):
        read(tmp_path / f"a.jsonl{suffix}")


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no file, nor a folder that holds any"):
        find_source("nothing")
    with pytest.raises(FileNotFoundError, match="no file, nor a folder that holds any"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("name", ["texts/bok", "nothing/a.jsonl", "nothing/a.txt.gz"])
def test_a_mistyped_file_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: no file, nor a folder that holds any"):
        find_source(name)


class Quiet(SimpleHTTPRequestHandler):
    """Tells no length of what is below /streamed, so that nothing can be sought there."""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(405)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Content-Length" or "/streamed" not in self.path:
            super().send_header(keyword, value)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the folder."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_read_like_files(tmp_path: Path, site: str) -> None:
    pytest.importorskip("aiohttp")
    rows: list[dict[str, object]] = [{"text": text} for text in TEXTS]
    table = write_jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(table))
    assert texts_of(f"{site}/a.jsonl.gz?download=1") == TEXTS
    (tmp_path / "streamed").mkdir()
    (tmp_path / "streamed" / "a.jsonl").write_bytes(table)
    assert texts_of(f"{site}/streamed/a.jsonl") == TEXTS
    with pytest.raises(ValueError, match=r"nothing.jsonl: cannot be read: 404"):
        read(f"{site}/nothing.jsonl")


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "a.parquet")
    asked, real = [], datasets.load_dataset

    def load(path: str, name: str | None, **options: Any) -> Any:
        """Take a folder for the hub."""
        asked.append((path, name, options["split"], options["streaming"]))
        return real(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts_of("owner/name") == texts_of("owner/name:config-1") == TEXTS
    assert asked == [("owner/name", None, "train", True), ("owner/name", "config-1", "train", True)]
    with pytest.raises(ValueError, match="owner/name of the hub, row 1: no field 'body', only"):
        read("owner/name", field="body")


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name of the hub: needs pip install 'mblm\[data\]"):
        read("owner/name")


def test_progress_ends_at_the_size_of_the_files(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "x" * 1000}] * 50
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b").write_bytes(bytes(5000))
    seen: list[int] = []
    list(read_source(find_source(str(tmp_path)), "text", whole=False, on_read=seen.append))
    assert sum(seen) == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(seen) == 51
