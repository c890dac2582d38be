"""Decoding state of a Transformer stage: keys, values and the delayed halves of the shifts.

A state is immutable to who holds it. Its tensors have room after the positions of each row, and the
first call that continues it writes there, so that a position costs no copy of those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# A copy has room for at least so many positions more.
_ROOM = 16


@dataclass(frozen=True, eq=False)
class TransformerState:
    """State of a batch of rows, which may be at different positions.

    Attributes:
        positions: Positions taken in, per row.
        keys, values: Per layer, ``(B, H, capacity, d)``; finite after a row's positions.
        delayed: Per layer, what the shifts before attention and before feed-forward take from the
            last position, ``(B, D // 2)`` each.
        room: One element as long as nobody has written after the positions.
    """

    positions: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    delayed: tuple[tuple[Tensor, Tensor], ...]
    room: list[None] = field(default_factory=list)

    def claim_room(self) -> bool:
        """Whether the caller may write after the positions: the first that asks, once."""
        # Outside of inference mode the graph of a gradient may have what is there.
        if not torch.is_inference_mode_enabled():
            return False
        try:
            self.room.pop()
        except IndexError:
            return False
        return True


def stack(states: Sequence[TransformerState]) -> TransformerState:
    """The rows of all states in one."""
    positions = tuple(p for state in states for p in state.positions)
    capacity = max(positions) + _ROOM

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        """A layer's keys or values of all rows, zeros after the longest of each state."""
        padded = []
        for state, part in zip(states, parts, strict=True):
            end = max(state.positions)
            padded.append(F.pad(part[:, :, :end], (0, 0, 0, capacity - end)))
        return torch.cat(padded)

    keys = zip(*(state.keys for state in states), strict=True)
    values = zip(*(state.values for state in states), strict=True)
    delayed = zip(*(state.delayed for state in states), strict=True)
    return TransformerState(
        positions,
        tuple(map(join, keys)),
        tuple(map(join, values)),
        tuple(tuple(map(torch.cat, zip(*layer, strict=True))) for layer in delayed),  # type: ignore[misc]
        [None],
    )


def split(state: TransformerState) -> list[TransformerState]:
    """The rows of a state."""
    return [
        TransformerState(
            (position,),
            tuple(part[row : row + 1] for part in state.keys),
            tuple(part[row : row + 1] for part in state.values),
            tuple((a[row : row + 1], b[row : row + 1]) for a, b in state.delayed),
        )
        for row, position in enumerate(state.positions)
    ]


class Continuation:
    """What a call that takes in ``count`` more positions of each row adds to a state.

    Attributes:
        first: The lowest of the rows' positions, and ``end`` one after the highest that is added.
        offsets: Position of each new one after ``first``, ``(B, count)``; None where all rows are
            at the same.
        mask: Which positions the new ones attend to, bool ``(B, 1, count, end)``; None where it is
            causal attention with the new ones last.
    """

    def __init__(self, state: TransformerState | None, x: Tensor) -> None:
        rows, self.count, _ = x.shape
        self.before = (0,) * rows if state is None else state.positions
        self.first, self.end = min(self.before), max(self.before) + self.count
        self.offsets = self.mask = None
        if self.first + self.count < self.end:
            steps = torch.arange(self.count, device=x.device)
            before = torch.tensor(self.before, device=x.device)
            self.offsets = before[:, None] - self.first + steps
            reached = self.first + self.offsets[:, None, :, None]
            self.mask = torch.arange(self.end, device=x.device) <= reached
        self._state = state
        self._may_write = state is not None and state.claim_room()
        self._keys: dict[int, Tensor] = {}  # by layer, which may be computed again
        self._values: dict[int, Tensor] = {}
        self._delayed: list[tuple[Tensor, Tensor]] = []

    def rotate_by(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary positions of the new ones, from those of ``first .. end - 1``."""
        if self.offsets is None:
            return cos, sin
        return cos[self.offsets][:, None], sin[self.offsets][:, None]

    def delayed(self, layer: int, part: int, dtype: torch.dtype) -> Tensor | None:
        """What a shift takes from the position before; None at the beginning."""
        return None if self._state is None else self._state.delayed[layer][part].to(dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values of a layer with these, ``(B, H, count, d)``, and `mask`."""
        before = (None, None)
        if self._state is not None:
            before = self._state.keys[layer], self._state.values[layer]  # type: ignore[assignment]
        keys = self._keys[layer] = self._append(before[0], k)
        values = self._values[layer] = self._append(before[1], v)
        keys, values = keys[:, :, : self.end], values[:, :, : self.end]
        return keys.to(k.dtype), values.to(v.dtype), self.mask

    def delay(self, of_attention: Tensor, of_feed_forward: Tensor) -> None:
        """Keep what the shifts of a layer take from the last new position, ``(B, D // 2)``."""
        self._delayed.append((of_attention, of_feed_forward))

    def state(self) -> TransformerState:
        """The state with the new positions."""
        after = tuple(position + self.count for position in self.before)
        kept = tuple(self._keys.values()), tuple(self._values.values()), tuple(self._delayed)
        return TransformerState(after, *kept, [None])

    def _append(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """Keys or values with the new ones, in the room that is there or in a copy with more."""
        # What is kept has the dtype of when it was: autocast may have begun or ended since.
        dtype = new.dtype if kept is None else torch.promote_types(kept.dtype, new.dtype)
        if kept is None or not self._may_write or self.end > kept.shape[2] or (dtype != kept.dtype):
            rows, heads, _, width = new.shape
            capacity = self.end + max(self.end, _ROOM)
            grown = new.new_zeros(rows, heads, capacity, width, dtype=dtype)
            end = max(self.before)
            if kept is not None:
                grown[:, :, :end] = kept[:, :, :end]
            kept = grown
        if self.offsets is None:
            kept[:, :, self.first : self.end] = new
        else:
            rows_of = torch.arange(len(new), device=new.device)[:, None]
            kept[rows_of, :, self.first + self.offsets] = new.transpose(1, 2).to(dtype)
        return kept
