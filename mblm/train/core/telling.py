"""How a run speaks on standard error: what must not be missed, losses, and how far it is."""

import logging
import math
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from typing_extensions import Self

from mblm.utils.say import say

SECONDS_PER_LINE = 60
_SMOOTHING = 0.95


def tell(log: logging.Logger, message: str) -> None:
    """Say something that must not be missed, on the main worker."""
    log.error(message)
    say(message)


def format_loss(loss: float, unit: str) -> str:
    """A loss for people: of bytes in bits."""
    return f"{loss / math.log(2):.3f} bits per byte" if unit == "byte" else f"loss {loss:.4f}"


class Progress:
    """The share of the batches that is done, loss (of bytes in bits), speed and time left.

    Without a ``bar``, ``say`` is called with a line every ``SECONDS_PER_LINE`` seconds and in the
    end. With one, the loss is looked at every ``interval`` seconds, which waits for a GPU.
    """

    def __init__(
        self,
        total: int,
        elements: int,
        *,
        done: int = 0,
        unit: str,
        bar: bool,
        say: Callable[[str], object],
        interval: float = 1.0,
    ) -> None:
        self._total = total
        self._elements = elements
        self._unit = unit
        self._say = say
        self._interval = interval if bar else SECONDS_PER_LINE
        self._bar = tqdm(total=total, initial=done, bar_format="{bar}") if bar else None
        self._done = self._looked = done  # now, and when the loss was last looked at
        self._loss: float | None = None
        self._start = 0.0  # when the first batch was done, which takes longer than others
        self._first = done + 1
        self._next = 0.0

    def update(self, loss: torch.Tensor) -> None:
        """Tell that a batch is done, and its loss, a scalar."""
        self._done += 1
        now = time.monotonic()
        if self._done == self._first:
            self._start = now
        elif now < self._next and self._done < self._total:
            return
        self._next = now + self._interval
        value = float(loss.detach())
        if self._loss is None or not math.isfinite(self._loss):
            self._loss = value
        else:
            old = _SMOOTHING ** (self._done - self._looked)
            self._loss = old * self._loss + (1 - old) * value
        self._looked = self._done
        facts = format_loss(self._loss, self._unit)
        if self._done > self._first:
            seconds = max(now - self._start, 1e-9) / (self._done - self._first)
            left = tqdm.format_interval(math.ceil(seconds * (self._total - self._done)))
            facts += f", {self._elements / seconds:,.0f} {self._unit}s/s, {left} left"
        share = f"{self._done / self._total:4.0%}"
        if self._bar is None:
            self._say(f"{share} {facts}")
        else:
            self._bar.bar_format = f"{share} |{{bar}}| {facts}"
            self._bar.update(self._done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
