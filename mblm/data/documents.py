"""The documents of files, folders, URLs and datasets of the hub, as bytes.

A table, which its name's end says (`TABLES`), has a document in each row; any other file is one.
Either may be compressed. Rows are read as they stand: nothing guesses numbers or dates from them.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from mblm.data.find_files import find_files
from mblm.data.packed import refuse_packed
from mblm.utils.errors import describe

TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


class Source(NamedTuple):
    """What a user names: its files or its URL; without any, a dataset of the hub."""

    name: str
    files: list[str]


class Document(NamedTuple):
    """A document; or why a row has none: it is ``"empty"``, ``"null"`` or ``"not Unicode"``."""

    data: bytes
    trouble: str = ""


def find_source(name: str) -> Source:
    """What a name means: a file, a folder, a glob, a URL or, as ``owner/name[:config]``, the hub.

    Raises:
        FileNotFoundError: None of these.
        ValueError: It is packed already.
    """
    if "://" in name:
        return Source(name, [name])
    suffix, compression = _suffixes(name)
    # A file that is mistyped: its folder is here, or it is named like a table or an archive.
    is_file = Path(name).parent.exists() or suffix in TABLES or compression
    if _HUB_NAME.fullmatch(name) and not is_file:
        return Source(name, [])
    try:
        files = find_files(Path(), [name]).values()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no file, nor a folder that holds any") from None
    refuse_packed(files)
    return Source(name, [str(file) for file in files])


def read_source(
    source: Source, field: str, *, whole: bool, on_read: Callable[[int], object]
) -> Iterator[Document]:
    """The documents of a source, in its order.

    Args:
        source: The source.
        field: The column of tables that holds them.
        whole: Whether tables are one document each, too.
        on_read: Called with how many bytes of a file were read.

    Raises:
        ValueError: What cannot be read, or a row that lacks the field; the message names file and
            row.
    """
    if not source.files:
        name = f"{source.name} of the hub"
        for document in _documents(name, _hub_rows(source.name, field), field):
            yield document
            on_read(len(document.data))
    for file in source.files:
        suffix = _suffixes(file)[0]
        if whole or suffix not in TABLES:
            suffix = ""
        yield from _documents(file, _file_rows(file, suffix, field, on_read), field)


def _documents(name: str, rows: Iterable[Any], field: str) -> Iterator[Document]:
    """Documents of rows, which are mappings, or of a whole file's bytes."""
    iterator, number = iter(rows), 0
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except ImportError as error:
            raise ValueError(f"{name}: needs pip install 'mblm[data]' ({error})") from error
        except Exception as error:  # whatever the many readers raise
            at = f"{name}, row {number}" if number > 1 else name
            reason = describe(error.__cause__ or error)  # of a URL the error is but its address
            raise ValueError(f"{at}: cannot be read: {reason}") from error
        yield _document(f"{name}, row {number}", row, field)


def _document(place: str, row: Any, field: str) -> Document:
    value = row
    if not isinstance(row, bytes):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected an object of fields, got {type(row).__name__}")
        if field not in row:
            there = ", ".join(map(repr, list(row)[:8]))
            raise ValueError(f"{place}: no field {field!r}, only {there or 'none'}")
        value = row[field]
    if value is None:
        return Document(b"", "null")
    if not isinstance(value, (str, bytes)):
        raise ValueError(f"{place}: {field!r} is no text but {type(value).__name__}")
    try:
        data = value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return Document(b"", "not Unicode")
    return Document(data, "" if data else "empty")


# -- Reading ---------------------------------------------------------------------------------------


def _suffixes(file: str) -> tuple[str, str]:
    """What a file is, such as ``.jsonl``, and how it is compressed, by its name."""
    path = PurePosixPath(file.partition("?")[0] if "://" in file else file)
    compression = path.suffix.lower() if path.suffix.lower() in _DECOMPRESS else ""
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def _file_rows(file: str, suffix: str, field: str, on_read: Callable[[int], object]) -> Any:
    """A table's rows; of any other file its bytes."""
    with _open(file) as raw:
        stream = _DECOMPRESS[compression](raw) if (compression := _suffixes(file)[1]) else raw
        at = 0
        for row in _rows(stream, suffix, field):
            yield row
            on_read(raw.tell() - at)
            at = raw.tell()


def _open(file: str) -> Any:
    if "://" not in file:
        return open(file, "rb")
    import fsspec

    # Buffered, as the lines of what a server sends without its length cannot be read from it.
    return io.BufferedReader(fsspec.open(file, "rb").open())


def _rows(stream: Any, suffix: str, field: str) -> Iterator[Any]:
    if suffix in (".jsonl", ".ndjson"):
        yield from (json.loads(line) for line in stream if line.strip())
    elif suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)  # the most there is on every system
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        table = csv.DictReader(text, delimiter="," if suffix == ".csv" else "\t", strict=True)
        if list(table.fieldnames or ()).count(field) > 1:
            raise ValueError(f"there are two columns {field!r}")
        for row in table:
            if None in row:
                raise ValueError("it has more values than there are columns")
            # A row that ends early lacks the fields after it.
            yield {name: value for name, value in row.items() if value is not None}
    elif suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(stream)
        columns = [field] if field in table.schema_arrow.names else None
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()
    else:
        yield stream.read()


def _hub_rows(name: str, field: str) -> Iterator[Any]:
    from datasets import load_dataset

    found = _HUB_NAME.fullmatch(name)
    assert found is not None
    rows = load_dataset(found["name"], found["config"], split="train", streaming=True)
    if field in (rows.column_names or ()):
        rows = rows.select_columns([field])
    yield from rows


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    from pyarrow import CompressedInputStream  # which notices where a stream is cut short

    return io.BufferedReader(CompressedInputStream(raw, "zstd"))


_DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
