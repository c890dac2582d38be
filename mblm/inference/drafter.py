"""Drafts by a smaller model: what it would write, for the larger one to check."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mblm.inference.engine import cache_for
from mblm.inference.plan import Draws, Plan

# Bytes that are proposed at a time: a pass checks them inside one patch.
_MOST = 8


class Drafter:
    """Proposes bytes after those of a row, as a smaller model writes them greedily.

    Args:
        model: The smaller model, an `mblm.MBLM` with as many token ids as the larger one. Where its
            context ends, it proposes nothing.
    """

    def __init__(self, model: Any) -> None:
        self._cache = cache_for(model, "float32")
        self._limit = model.max_length
        # A greedy plan draws numbers, too: those of the larger model's generator are not for it.
        self._generator = torch.Generator(model.device)
        (self._row,) = self._cache.add()
        self._length = 0
        # A copy of the row with the bytes proposed last, which may turn out to be right.
        self._ahead: int | None = None
        self._proposed: list[int] = []

    def propose(self, ids: Sequence[int] | Tensor) -> Tensor | None:
        """The bytes that may come next.

        Args:
            ids: Those that have come since the last call, ``(n,)``.

        Returns:
            Token ids ``(n,)`` int64 on the CPU, or None.
        """
        cache, known = self._cache, len(self._proposed)
        ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
        self._length += len(ids)
        if self._ahead is not None:
            row, self._ahead = self._ahead, None
            if self._proposed == ids[:known].tolist():
                row, self._row, ids = self._row, row, ids[known:]
            cache.drop([row])
        if self._limit is not None and self._length + _MOST > self._limit:
            return None
        cache.feed([self._row], [ids])
        (self._ahead,) = cache.copy([self._row])
        cache.begin([self._ahead], [Plan(_MOST, draws=Draws(self._generator))])
        parts = [cache.run([self._ahead])[0]]
        while parts[-1].reason == "time":
            parts += cache.run([self._ahead])
        proposed = torch.cat([part.ids for part in parts])
        self._proposed = proposed.tolist()
        return proposed
