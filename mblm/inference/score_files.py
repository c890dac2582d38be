"""Bits per byte of files, which are read as they are scored."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mblm.inference.prompt import prompt_ids
from mblm.inference.scorer import BATCH_BYTES, Scorer, Source
from mblm.utils.io import STANDARD_INPUT, open_binary

if TYPE_CHECKING:
    from mblm.model.mblm import MBLM

# Bytes that are read at once, for which there must be memory whatever is asked for.
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileScore:
    """How well the bytes of a file are predicted.

    Attributes:
        num_bytes: How many bytes count: all but those equal to the model's padding, which a model
            never learns to predict.
        bits: The sum of theirs.
    """

    num_bytes: int = 0
    bits: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """The mean; NaN if no byte counts."""
        return self.bits / self.num_bytes if self.num_bytes else math.nan


def score_files(
    model: "MBLM",
    files: Sequence[str | os.PathLike[str]],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_bytes: int = BATCH_BYTES,
    on_progress: Callable[[int], object] | None = None,
) -> list[FileScore]:
    """Score files of any length, which are read from their beginnings to their ends.

    Memory does not grow with a file.

    Args:
        model: See `mblm.MBLM.score`, as ``length``, ``stride`` and ``batch_bytes``.
        files: The files; pipes and the like are read once, and ``-`` is standard input.
        on_progress: Called with a number of bytes whenever so many more are done.

    Returns:
        One for each file.

    Raises:
        OSError: A file cannot be read; one that is missing is told before any is scored.
        TypeError, ValueError: No files, or as of `mblm.MBLM.score`; a byte outside the
            vocabulary is found when it is read.
    """
    if isinstance(files, (str, os.PathLike)):
        raise TypeError(f"files: expected a list of files, got {files!r}; of one it is [file]")
    if not files:
        raise ValueError("files: expected at least one file, got none")
    scorer = Scorer(model, length, stride, batch_bytes)
    paths = [Path(file) for file in files]
    if paths.count(STANDARD_INPUT) > 1:
        raise ValueError("files: standard input, -, can be read once")
    for path in paths:
        if path != STANDARD_INPUT:
            path.stat()
    return [_score_file(scorer, model, path, on_progress) for path in paths]


def _score_file(
    scorer: Scorer, model: "MBLM", file: Path, on_progress: Callable[[int], object] | None
) -> FileScore:
    count, nats = 0, 0.0
    with open_binary(file) as read_some:
        read = partial(_read, read_some, str(file), model.num_tokens)
        for piece, found in scorer.run(scorer.pieces(Source(read(0), read))):
            counts = piece.ids[piece.first :] != model.pad_token_id
            nats -= float(found[counts, 0].double().sum())
            count += int(counts.sum())
            if on_progress is not None:
                on_progress(len(found))
    return FileScore(count, nats / math.log(2))


def _read(read_some: Callable[[int], bytes], name: str, num_tokens: int, count: int) -> Tensor:
    data = bytearray()
    while len(data) < count and (part := read_some(min(count - len(data), _READ_BYTES))):
        data += part
    return prompt_ids(name, data, num_tokens)
