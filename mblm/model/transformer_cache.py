"""Decoding state of a Transformer stage: keys, values and the delayed halves of the shifts."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mblm.inference.advance import prefill_natively
from mblm.inference.stage_cache import StageCache, State
from mblm.model.native_stages import native_transformer
from mblm.model.plain import is_bare, is_plain
from mblm.model.transformer_layers import Rotary, RotaryEmbedding

if TYPE_CHECKING:
    from mblm.model.transformer import TransformerDecoder

_FIRST_CAPACITY = 64


class TransformerCache(StageCache):
    """Keys and values ``(layers, B, H, capacity, d)``, grown by doubling as positions come."""

    def __init__(
        self, stage: "TransformerDecoder", batch_size: int, max_positions: int | None
    ) -> None:
        self.stage = stage
        self.batch_size = batch_size
        self.position = 0
        self._max_positions = max_positions
        self._keys: torch.Tensor | None = None  # allocated when their dtype is known
        self._values: torch.Tensor | None = None
        # Delayed half of attention's and of feed-forward's input, (layers, 2, B, D // 2).
        self._delayed: torch.Tensor | None = None
        self._rotary: Rotary | None = None
        self._rotary_count = 0

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        if self.prefills_natively(x):
            return prefill_natively([self], x)
        if is_bare(self.stage):  # and compiled for training, maybe
            return self.advance(x)
        y: torch.Tensor = self.stage(x, cache=self)
        return y

    def advance(self, x: torch.Tensor) -> torch.Tensor:
        """`prefill` by the stage's layers."""
        end = self.position + x.shape[1]
        rotary = self._rotary_at(self.position, x.shape[1])
        kept = x.shape[-1] - x.shape[-1] // 2
        delayed = self._reserve_delayed(x)
        for index, (attention, feed_forward) in enumerate(self.stage.layer_pairs()):
            extend, previous = partial(self._extend, index), self._delayed_half(index, 0, x)
            last = x[:, -1, kept:]
            x = x + attention(x, rotary, previous=previous, extend=extend)
            delayed[index, 0] = last
            last = x[:, -1, kept:]
            x = x + feed_forward(x, self._delayed_half(index, 1, x))
            delayed[index, 1] = last
        self.position = end
        return self.stage.norm(x)

    def _extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """All keys and values of a layer with these, ``(B, H, S, d)``, after those so far."""
        first, end = self.position, self.position + k.shape[2]
        keys, values, _ = self._reserve(end, k.dtype, k)
        keys[layer, :, :, first:end] = k
        values[layer, :, :, first:end] = v
        # What is stored has the dtype of when it was: autocast may have begun or ended since.
        return keys[layer, :, :, :end].to(k.dtype), values[layer, :, :, :end].to(v.dtype), None

    def empty(self, batch_size: int) -> "TransformerCache":
        return TransformerCache(self.stage, batch_size, None)

    def build_native(self, weights: str) -> Any:
        return native_transformer(self.stage, weights)

    def native_state(self, count: int) -> list[torch.Tensor]:
        end = self.position + count
        weight = self.stage.norm.g
        if self._keys is not None and self._values is not None:  # stored under autocast
            self._keys, self._values = self._keys.float(), self._values.float()
        state = self._reserve(end, weight.dtype, weight)
        self._plain_rotary_at(0, end)
        return state if self._rotary is None else [*state, *self._rotary]

    def native_start(self, state: State) -> list[torch.Tensor]:
        _, _, delayed = state  # keys and values of the start token stay where they are
        return [delayed.float().contiguous()]

    def rows_of_state(self, state: State, rows: slice) -> State:
        if state is None:
            return None
        keys, values, delayed = state
        return [keys[:, rows], values[:, rows], delayed[:, :, rows]]

    def snapshot(self) -> State:
        if self._keys is None or self._values is None or self._delayed is None:
            return None
        end = self.position
        return [
            self._keys[:, :, :, :end].clone(),
            self._values[:, :, :, :end].clone(),
            self._delayed.clone(),
        ]

    def restore(self, state: State) -> None:
        if state is None:
            self.position = 0
            return
        keys, values, delayed = state
        self.position = 0  # what is there need not be kept when buffers grow
        own_keys, own_values, own_delayed = self._reserve(keys.shape[3], keys.dtype, delayed)
        self.position = keys.shape[3]
        own_keys[:, :, :, : self.position] = keys
        own_values[:, :, :, : self.position] = values
        own_delayed.copy_(delayed)

    def _delayed_half(self, layer: int, part: int, x: torch.Tensor) -> torch.Tensor | None:
        """What a shift takes from the position before, ``(B, D // 2)``; None before the first."""
        if self._delayed is None or self.position == 0:
            return None
        return self._delayed[layer, part].to(x.dtype)

    def _reserve(
        self, positions: int, dtype: torch.dtype, like: torch.Tensor
    ) -> list[torch.Tensor]:
        """Keys and values with room for so many positions, and the delayed halves."""
        delayed = self._reserve_delayed(like)
        capacity = 0 if self._keys is None else self._keys.shape[3]
        if self._keys is None or positions > capacity:
            capacity = max(positions, 2 * capacity, _FIRST_CAPACITY)
            if self._max_positions is not None:
                capacity = max(positions, min(capacity, self._max_positions))
            self._keys = self._grown(self._keys, capacity, dtype, like)
            self._values = self._grown(self._values, capacity, dtype, like)
        assert self._values is not None
        return [self._keys, self._values, delayed]

    def _reserve_delayed(self, like: torch.Tensor) -> torch.Tensor:
        if self._delayed is None:
            layers, half = len(self.stage.layers), self.stage.model_dim // 2
            self._delayed = like.new_zeros(layers, 2, self.batch_size, half)
        return self._delayed

    def _grown(
        self, buffer: torch.Tensor | None, capacity: int, dtype: torch.dtype, like: torch.Tensor
    ) -> torch.Tensor:
        heads, head_dim = self.stage.num_heads, self.stage.head_dim
        shape = (len(self.stage.layers), self.batch_size, heads, capacity, head_dim)
        grown = like.new_empty(shape, dtype=dtype)
        if buffer is not None:
            grown[:, :, :, : self.position] = buffer[:, :, :, : self.position]
        return grown

    def _rotary_at(self, first: int, count: int) -> Rotary | None:
        """Rotary positions, from a table where nobody changed what they are."""
        if self.stage.rotary_emb is None or is_plain(self.stage.rotary_emb, RotaryEmbedding):
            return self._plain_rotary_at(first, count)
        return self.stage.rotary(first, count)

    def _plain_rotary_at(self, first: int, count: int) -> Rotary | None:
        """The same from a table that grows by doubling."""
        if self.stage.rotary_emb is None:
            return None
        if self._rotary is None or first + count > self._rotary_count:
            self._rotary_count = max(first + count, 2 * self._rotary_count, _FIRST_CAPACITY)
            self._rotary = self.stage.rotary(0, self._rotary_count)
        assert self._rotary is not None
        cos, sin = self._rotary
        return cos[first : first + count], sin[first : first + count]
