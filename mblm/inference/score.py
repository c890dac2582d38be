"""How likely a model finds bytes: the log-probability of each, of texts of any length."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mblm.inference.prompt import Prompt, prompt_ids
from mblm.inference.scorer import BATCH_BYTES, Piece, Scorer, Source


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a model finds the bytes of a text.

    Attributes:
        log_probs: The logarithm of each byte's probability, given all before it, in nats:
            ``(L,)`` float32 on the CPU.
        is_likeliest: Whether each byte is the likeliest there, ``(L,)`` bool on the CPU.
    """

    log_probs: Tensor
    is_likeliest: Tensor

    def __len__(self) -> int:
        return len(self.log_probs)

    @property
    def bits(self) -> float:
        """What the text takes if a perfect coder uses the model: the sum of its bytes, in bits."""
        return float(self.log_probs.double().neg().sum()) / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """The mean over the bytes; NaN if there are none."""
        return self.bits / len(self) if len(self) else math.nan

    @property
    def is_greedy(self) -> bool:
        """Whether all bytes are the likeliest: ``temperature=0`` generates this text."""
        return bool(self.is_likeliest.all())

    def __repr__(self) -> str:
        return f"Score({len(self):,} bytes, {self.bits_per_byte:.4f} bits per byte)"


def score(
    model: Any,
    data: Prompt | Sequence[Prompt],
    given: Prompt | Sequence[Prompt] = b"",
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_bytes: int = BATCH_BYTES,
) -> Score | list[Score]:
    """Tell how likely a model finds bytes; see `mblm.MBLM.score`."""
    scorer = Scorer(model, length, stride, batch_bytes)
    is_list = isinstance(data, (list, tuple)) and not (data and _are_ids(data))
    texts = _texts("data", data if is_list else [data], is_list, model.num_tokens)
    if isinstance(given, (list, tuple)) and not _are_ids(given):
        if not is_list or len(given) != len(texts):
            expected = f"a list of {len(texts)}, one for each text" if is_list else "one text"
            raise ValueError(f"given: expected {expected}, got a list of {len(given)}")
        prefixes = _texts("given", given, True, model.num_tokens)
    else:
        prefixes = _texts("given", [given], False, model.num_tokens) * len(texts)

    with torch.inference_mode(False):  # the caller's own
        log_probs = [torch.empty(len(ids), dtype=torch.float32, device="cpu") for ids in texts]
        are_likeliest = [torch.empty(len(ids), dtype=torch.bool, device="cpu") for ids in texts]
    pieces: Iterable[Piece] = (
        piece
        for text, (prefix, ids) in enumerate(zip(prefixes, texts, strict=True))
        for piece in scorer.pieces(Source(torch.cat((prefix, ids))), len(prefix), text)
    )
    if len(texts) > 1:  # those of like lengths together
        pieces = sorted(pieces, key=lambda p: len(p.ids) if p.before is None else 0)
    for piece, found in scorer.run(pieces):
        at = slice(piece.start, piece.start + len(found))
        log_probs[piece.text][at] = found[:, 0]
        are_likeliest[piece.text][at] = found[:, 1] > 0
    scores = list(map(Score, log_probs, are_likeliest))
    return scores if is_list else scores[0]


def _are_ids(items: Sequence[Any]) -> bool:
    return all(isinstance(item, Integral) for item in items)


def _texts(name: str, given: Any, is_list: bool, num_tokens: int) -> list[Tensor]:
    return [
        prompt_ids(f"{name}[{index}]" if is_list else name, text, num_tokens)
        for index, text in enumerate(given)
    ]
