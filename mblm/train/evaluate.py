"""How well a model predicts files: bits per byte, in memory that does not grow with the files."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mblm.model.mblm import MBLM
from mblm.utils.checks import check_integer
from mblm.utils.io import STANDARD_INPUT, open_binary


@dataclass
class Score:
    """How well bytes are predicted.

    Attributes:
        num_bytes: How many bytes count: all but those equal to the model's padding, which a model
            never learns to predict.
        nats: The sum of their losses.
    """

    num_bytes: int = 0
    nats: float = 0.0

    @property
    def bits_per_byte(self) -> float | None:
        """The mean loss in bits, None where no byte counts."""
        return self.nats / self.num_bytes / math.log(2) if self.num_bytes else None


def evaluate(
    model: MBLM,
    files: Sequence[Path],
    *,
    length: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> list[Score]:
    """Score files of any length.

    A file is cut into windows, the last of which may be shorter; a byte is predicted from the
    bytes before it in its window. Files are read to their end, a batch of windows at a time; of a
    window, only the most global stage's positions are held at once.

    Args:
        model: The model, in evaluation mode.
        files: The files; pipes and the like are read once, and ``-`` is standard input.
        length: Bytes of a window. Default: the model's context.
        batch_size: How many windows are looked at together. Default 8.
        on_progress: Called with a number of bytes whenever so many more are done.

    Returns:
        One score per file.

    Raises:
        OSError: A file cannot be read; found before any is scored.
        ValueError: No files, a length or batch size below 1, a length over what the model takes,
            or a byte outside the model's vocabulary.
    """
    if not files:
        raise ValueError("files: expected at least one file, got none")
    length = model.context_size if length is None else check_integer("length", length)
    if length < 1 or check_integer("batch_size", batch_size) < 1:
        raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
    if model.max_length is not None and length > model.max_length:
        raise ValueError(f"length: {length} exceeds the model's context of {model.max_length}")
    for file in files:
        _check_readable(file)
    return [_score_file(model, file, length, batch_size, on_progress) for file in files]


@torch.inference_mode()
def _score_file(
    model: MBLM,
    file: Path,
    length: int,
    batch_size: int,
    on_progress: Callable[[int], object] | None,
) -> Score:
    score = Score()
    device = model.device
    for windows in _windows(file, length, batch_size):
        ids = windows.to(device).long()  # (B, L)
        counts = ids != model.pad_token_id
        score.nats += float(model.loss_sum(ids)[0])
        score.num_bytes += int(counts.sum())
        if on_progress is not None:
            on_progress(ids.numel())
    return score


def _check_readable(file: Path) -> None:
    if file == STANDARD_INPUT or file.is_file() or file.is_dir():
        with open_binary(file):
            pass
    else:  # a pipe would lose its writer
        file.stat()


def _windows(file: Path, length: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of windows ``(B, length)``, uint8, then what is left ``(1, < length)``."""
    with open_binary(file) as stream:
        ended = False
        while not ended:
            data = bytearray(stream.read(batch_size * length))
            ended = len(data) < batch_size * length
            whole = len(data) // length * length
            if whole:
                yield torch.frombuffer(data, dtype=torch.uint8, count=whole).view(-1, length)
            if whole < len(data):
                yield torch.frombuffer(data, dtype=torch.uint8, offset=whole)[None]
