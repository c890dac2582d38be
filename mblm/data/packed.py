"""A packed folder: many documents as one file of bytes for each part, as ``mblm pack`` writes it.

<folder>/
    pack.json               what was packed, a `PackSummary`
    train/bytes.bin         the documents of the part, one after another
    train/documents.npy     where each starts, and where the last ends: (documents + 1,), int64
    valid/                  the same, unless packed without a validation part
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, NonNegativeInt, ValidationError

from mblm.data.file_bytes import FileBytes
from mblm.data.types import ModelMode
from mblm.utils.errors import describe, with_title

BYTES, DOCUMENTS, SUMMARY = "bytes.bin", "documents.npy", "pack.json"


class PackedPart(BaseModel):
    """One part: its documents, their bytes in all and of each source, and what they hash to."""

    documents: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    sources: dict[str, int]


class PackSummary(BaseModel):
    """What was packed: the parts by name, and how many documents were left out, by reason."""

    parts: dict[str, PackedPart]
    left_out: dict[str, int]


def is_packed(folder: Path) -> bool:
    """Whether a folder is packed."""
    return (folder / SUMMARY).is_file()


def refuse_packed(files: Iterable[Path]) -> None:
    """Refuse the files of a packed folder among others: its offsets are no text."""
    for file in files:
        if file.name == DOCUMENTS and file.with_name(BYTES).exists():
            raise ValueError(
                f"{str(file)!r} is of a packed folder: train on that folder itself, as dataset_dir "
                "or among sources"
            )


def read_summary(folder: str | os.PathLike[str]) -> PackSummary:
    """What a packed folder holds.

    Raises:
        ValueError: Its summary is none.
    """
    file = Path(folder, SUMMARY)
    try:
        return PackSummary.model_validate_json(file.read_bytes())
    except ValidationError as error:
        # No error of fields: whoever asks has arguments of its own, which these would seem to be.
        raise ValueError(describe(with_title(error, str(file)))) from None


def open_part(
    folder: str | os.PathLike[str], mode: ModelMode, separator_id: int | None = None
) -> FileBytes:
    """The documents of a part as a row of ids, with the separator between two of them.

    Args:
        folder: A folder that `pack` wrote.
        mode: The part.
        separator_id: The id between two documents. Default: none comes between them.

    Raises:
        OSError: A file is missing.
        ValueError: There is no such part, or its files do not fit together.
    """
    folder = Path(folder)
    part = read_summary(folder).parts.get(mode.value)
    if part is None:
        raise ValueError(f"{str(folder)!r} was packed without a {mode.value} part")
    file = folder / mode.value / DOCUMENTS
    try:
        offsets = np.load(file, allow_pickle=False)
    except (EOFError, ValueError):
        offsets = np.empty(0)
    if (
        offsets.dtype == np.int64
        and offsets.shape == (part.documents + 1,)
        and (offsets[0], offsets[-1]) == (0, part.bytes)
        and (np.diff(offsets) > 0).all()
    ):
        data = FileBytes([folder / mode.value / BYTES], separator_id, offsets[:-1])
        if sum(data.sizes) == part.bytes:
            return data
    raise ValueError(f"{str(file)!r} does not fit {BYTES} and {SUMMARY}: pack again")


def lineage_of_part(folder: Path, mode: ModelMode) -> list[tuple[str, int]]:
    """A part's file, by what it hashes to, with each source and its bytes."""
    part = read_summary(folder).parts[mode.value]
    name = f"{mode.value}/{BYTES} ({part.sha256[:12]})"
    return [(f"{name} of {source}", size) for source, size in part.sources.items()]
