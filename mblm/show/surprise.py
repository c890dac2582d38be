"""How much each byte of a text surprises a model, and what it would rather have seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mblm.inference.prompt import Prompt, prompt_ids, to_bytes
from mblm.inference.scorer import Scorer, Source

if TYPE_CHECKING:
    from mblm.model.mblm import MBLM

ALTERNATIVES = 4


@dataclass(frozen=True, eq=False)
class Surprise:
    """How much each byte of a text surprises a model.

    Attributes:
        data: The text, L bytes.
        bits: What each byte takes, ``(L,)`` float32.
        alternatives: The ids that are likeliest there, the likeliest first, ``(L, K)`` int64.
        probabilities: Theirs, ``(L, K)`` float32.
        places: Where each byte stands in the sequence that the model saw, ``(L,)`` int64. In a text
            longer than the context this is not its place in the text.
        counts: Which bytes are no padding to the model, ``(L,)`` bool.
        patches: The bytes of a patch of each stage whose patches have several.
    """

    data: bytes
    bits: np.ndarray
    alternatives: np.ndarray
    probabilities: np.ndarray
    places: np.ndarray
    counts: np.ndarray
    patches: list[int]

    @property
    def bits_per_byte(self) -> float:
        """The mean over the bytes that are no padding; NaN if there are none."""
        bits = self.bits[self.counts]
        return float(bits.mean(dtype=np.float64)) if len(bits) else math.nan

    def __str__(self) -> str:
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.counts.any() else ""
        return f"{len(self.data):,} bytes{bits}"

    def bits_by_place(self, patch: int, most: int = 64) -> np.ndarray:
        """Mean bits of the bytes at each place in a patch of so many bytes, from first to last.

        Places that follow each other count together where there are more than ``most``. NaN where
        the text has no byte.
        """
        size = min(patch, most)
        bins = self.places[self.counts] % patch * size // patch
        total = np.bincount(bins, self.bits[self.counts], size)
        with np.errstate(invalid="ignore"):
            return total / np.bincount(bins, minlength=size)


def measure(
    model: "MBLM", data: Prompt, *, on_progress: Callable[[int], object] | None = None
) -> Surprise:
    """Tell how much each byte of a text surprises a model, as `mblm.MBLM.score` does.

    Args:
        model: The model, in evaluation mode.
        data: The text: bytes, a string (UTF-8), or ids of bytes.
        on_progress: Called with a number of bytes whenever so many more are done.

    Raises:
        TypeError, ValueError: Something else, or a byte outside the model's vocabulary.
    """
    count = min(ALTERNATIVES, model.num_tokens)
    ids = prompt_ids("data", data, min(model.num_tokens, 256))
    scorer = Scorer(model, alternatives=count)
    found = np.empty((len(ids), 2 + 2 * count), np.float32)
    places = np.empty(len(ids), np.int64)
    for piece, rows in scorer.run(scorer.pieces(Source(ids))):
        at = slice(piece.start, piece.start + len(rows))
        found[at] = rows.numpy()
        first = piece.first + (piece.before or 0)
        places[at] = np.arange(first, first + len(rows))
        if on_progress is not None:
            on_progress(len(rows))
    return Surprise(
        to_bytes(ids),
        np.maximum(found[:, 0] / -math.log(2), 0),
        found[:, 2 : 2 + count].astype(np.int64),
        np.exp(found[:, 2 + count :]),
        places,
        torch.ne(ids, model.pad_token_id).numpy(),
        [patch for patch in model.patch_sizes if patch > 1],
    )
