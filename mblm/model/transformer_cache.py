"""Decoding state of a Transformer stage: keys, values and the delayed halves of the shifts."""

from typing import TYPE_CHECKING

import torch

from mblm.inference.stage_cache import StageCache, State
from mblm.model.transformer_layers import Rotary

if TYPE_CHECKING:
    from mblm.model.transformer import TransformerDecoder

_FIRST_CAPACITY = 64


class TransformerCache(StageCache):
    """Keys and values ``(B, H, capacity, d)`` per layer, grown by doubling as positions come."""

    def __init__(
        self, stage: "TransformerDecoder", batch_size: int, max_positions: int | None
    ) -> None:
        self.stage = stage
        self.batch_size = batch_size
        self.position = 0
        self._max_positions = max_positions
        # Per layer: delayed half of attention's and of feed-forward's input, (B, D // 2).
        self._delayed: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [
            (None, None) for _ in stage.layers
        ]
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rotary: Rotary | None = None
        self._rotary_count = 0

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        first, count = self.position, x.shape[1]
        rotary = self._rotary_at(first, count)
        delayed_from = x.shape[-1] - x.shape[-1] // 2
        for index, (attention, feed_forward) in enumerate(self.stage.layer_pairs()):
            before_attention, before_feed_forward = self._delayed[index]
            q, k, v = attention.project(x, rotary, before_attention)
            keys, values = self._append(index, k, v)
            last_attention = x[:, -1, delayed_from:].clone()
            x = x + attention.attend(q, keys, values, is_causal=True)
            last_feed_forward = x[:, -1, delayed_from:].clone()
            x = x + feed_forward(x, before_feed_forward)
            self._delayed[index] = (last_attention, last_feed_forward)
        self.position = first + count
        return self.stage.norm(x)

    def snapshot(self) -> State:
        end = self.position
        return (
            [keys[:, :, :end].clone() for keys in self._keys],
            [values[:, :, :end].clone() for values in self._values],
            [
                tuple(half.clone() for half in halves if half is not None)
                for halves in self._delayed
            ],
        )

    def restore(self, state: State) -> None:
        keys, values, delayed = state
        self.position = keys[0].shape[2] if keys else 0
        for index, (saved_keys, saved_values) in enumerate(zip(keys, values, strict=True)):
            self._reserve(index, saved_keys, self.position)
            self._keys[index][:, :, : self.position] = saved_keys
            self._values[index][:, :, : self.position] = saved_values
        self._delayed = [tuple(halves) or (None, None) for halves in delayed]

    def _append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``k`` and ``v (B, H, S, d)`` and return all keys and values so far."""
        end = self.position + k.shape[2]
        self._reserve(layer, k, end)
        self._keys[layer][:, :, self.position : end] = k
        self._values[layer][:, :, self.position : end] = v
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def _reserve(self, layer: int, like: torch.Tensor, positions: int) -> None:
        if layer == len(self._keys):
            self._keys.append(like.new_empty(0))
            self._values.append(like.new_empty(0))
        old = self._keys[layer].shape[2] if self._keys[layer].ndim == 4 else 0
        if positions <= old:
            return
        capacity = max(positions, 2 * old, _FIRST_CAPACITY)
        if self._max_positions is not None:
            capacity = max(positions, min(capacity, self._max_positions))
        for buffers in (self._keys, self._values):
            grown = like.new_empty(*like.shape[:2], capacity, like.shape[3])
            if old:
                grown[:, :, :old] = buffers[layer]
            buffers[layer] = grown

    def _rotary_at(self, first: int, count: int) -> Rotary | None:
        """Rotary positions, from a table that grows by doubling."""
        if self.stage.rotary_emb is None:
            return None
        if self._rotary is None or first + count > self._rotary_count:
            self._rotary_count = max(first + count, 2 * self._rotary_count, _FIRST_CAPACITY)
            self._rotary = self.stage.rotary(0, self._rotary_count)
        assert self._rotary is not None
        cos, sin = self._rotary
        return cos[first : first + count], sin[first : first + count]
