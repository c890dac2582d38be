"""How a stage takes part in incremental decoding: the cache protocol and its two adapters.

A stage model offers one of three things, tried in this order:

1. ``allocate_cache(batch_size, max_positions) -> StageCache``: a cache of its own;
2. ``forward_with_state(x, state) -> (y, state)``: the hook for recurrent models. ``x`` and ``y``
   are ``(B, S, D)``; ``state`` is None at the beginning, otherwise a nest of tuples and lists of
   tensors that the hook returned before and never writes to;
3. neither, or a hook on the stage, which 2 does not call: its inputs since the start token are
   kept and its ``forward`` runs on all of them.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from mblm.inference.packing import Guard
from mblm.model.plain import is_bare

# A nest of tuples, lists and None with tensors as leaves.
State = Any

# Compiled code takes in up to so many positions of all sequences at a time. Beyond that, PyTorch's
# products are faster: from 20 to 60 positions on, as stage, width and type of weights have it
# (benchmarks/feed.py).
NATIVE_POSITIONS = 24


def computes_natively(dtype: torch.dtype) -> bool:
    """Whether compiled code may compute what is of this dtype here and now."""
    return (
        dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
    )


class StageCache(ABC):
    """Decoding state of one stage for a batch of equally long sequences.

    Attributes:
        native: The stage in compiled code, ``torch.classes.mblm.Stage``, which then takes in up to
            `NATIVE_POSITIONS` at a time; None where there is none. It works on the tensors of
            `native_state`.
        guard: Watches over the modules that `native` stands in for.
        position: Positions taken in, where the cache counts them.
    """

    native: Any = None
    guard: Guard | None = None
    position: int = 0

    @abstractmethod
    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        """Take in the next S positions: ``(B, S, D) -> (B, S, D)``, S >= 1."""

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Take in the next position: ``(B, D) -> (B, D)``."""
        return self.prefill(x[:, None])[:, 0]

    def empty(self, batch_size: int) -> "StageCache | None":
        """Another of the same kind that has taken in nothing; None: `allocate_cache` makes it."""
        return None

    def build_native(self, weights: str) -> Any:
        """The stage in compiled code with weights of this type, or None."""
        return None

    def native_state(self, count: int) -> list[torch.Tensor]:
        """What `native` works on, with room for ``count`` more positions."""
        raise NotImplementedError

    def native_start(self, state: State) -> list[torch.Tensor]:
        """What of a snapshot after the start token `native` copies to start anew."""
        raise NotImplementedError

    def runs_natively(self, dtype: torch.dtype) -> bool:
        """Whether `native` takes in a position of this dtype here and now."""
        guard = self.guard
        return (
            self.native is not None
            and computes_natively(dtype)
            and (guard is None or guard.holds())
        )

    def prefills_natively(self, x: torch.Tensor) -> bool:
        """Whether `native` takes in ``x (B, S, D)`` here and now: single positions, or a few."""
        batch_size, count, _ = x.shape
        return self.runs_natively(x.dtype) and (
            count == 1 or 0 < batch_size * count <= NATIVE_POSITIONS
        )

    def rows_of_state(self, state: State, rows: slice) -> State:
        """A snapshot of some of the sequences alone.

        Raises:
            ValueError: The state is not known to have sequences that could be told apart.
        """
        raise ValueError(
            f"a {type(self).__name__} does not tell sequences apart, so that after their first "
            "bytes they cannot become different in length"
        )

    @abstractmethod
    def snapshot(self) -> State:
        """The state so far, independent of what the cache does later."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Go back to a snapshot, which stays intact."""


class StatefulCache(StageCache):
    """Cache of a stage model with the hook ``forward_with_state``."""

    def __init__(self, stage: nn.Module) -> None:
        self._stage: Any = stage
        self._state: State = None

    def empty(self, batch_size: int) -> "StatefulCache":
        return StatefulCache(self._stage)

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        if not is_bare(self._stage):
            raise RuntimeError(
                f"a hook was added to a {type(self._stage).__name__} after decoding began, which "
                "its forward_with_state would not call; start a new session"
            )
        y, self._state = self._stage.forward_with_state(x, self._state)
        return y

    def snapshot(self) -> State:
        return self._state  # The hook never writes to a state, so that it can be shared.

    def restore(self, state: State) -> None:
        self._state = state


class ReplayCache(StageCache):
    """Cache of a stage model that offers nothing: inputs are kept and run again."""

    def __init__(self, stage: nn.Module) -> None:
        self._stage: Any = stage
        self._inputs: torch.Tensor | None = None

    def empty(self, batch_size: int) -> "ReplayCache":
        return ReplayCache(self._stage)

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        self._inputs = x if self._inputs is None else torch.cat((self._inputs, x), dim=1)
        y: torch.Tensor = self._stage(self._inputs)
        return y[:, -x.shape[1] :]

    def rows_of_state(self, state: State, rows: slice) -> State:
        return None if state is None else state[rows]

    def snapshot(self) -> State:
        return self._inputs

    def restore(self, state: State) -> None:
        self._inputs = state


def allocate_cache(
    stage: nn.Module, batch_size: int, max_positions: int | None, weights: str | None = None
) -> StageCache:
    """Cache for decoding with ``stage``.

    Args:
        stage: The stage model.
        batch_size: Sequences decoded side by side.
        max_positions: Upper bound of the positions, start token included; None if there is none.
        weights: Type of the weights that compiled code reads, where the stage has such code; None
            builds none.
    """
    own: Any = getattr(stage, "allocate_cache", None)
    if own is not None:
        cache: StageCache = own(batch_size, max_positions)
        if weights is not None:
            cache.native = cache.build_native(weights)
        if cache.native is not None:
            parts: Any = stage.parts
            cache.guard = Guard(list(parts()))
        return cache
    if hasattr(stage, "forward_with_state") and is_bare(stage):
        return StatefulCache(stage)
    return ReplayCache(stage)
