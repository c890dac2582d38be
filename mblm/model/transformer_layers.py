"""Layers of the Transformer stages: RMSNorm, rotary positions, attention, feed-forward.

The causal shift that precedes attention and feed-forward is fused with their norm: the last half
of the channels comes from the position before.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.model.linear import apply
from mblm.model.plain import Part, is_plain, parts_in
from mblm.model.utils import frequencies
from mblm.ops.linear import linear
from mblm.ops.shift_rms_norm import shift_rms_norm, shifted
from mblm.ops.short_attention import MAX_POSITIONS, short_attention
from mblm.utils.transforms import is_transformed

# Up to this many positions, causal attention on a CPU is faster without PyTorch's kernel, and a
# start token that all rows share is worth computing once.
SHORT = MAX_POSITIONS

# Cosines and sines, (S, head width / 2) float32; (B, 1, S, head width / 2) where rows differ.
Rotary = tuple[Tensor, Tensor]
# Puts keys and values (B, H, S, d) after those so far, and gives all and what is attended to.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


class RMSNorm(nn.Module):
    """``x / max(||x||_2 * dim**-0.5, 1e-8) * g``, over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(..., S, dim)``."""
        return shift_rms_norm(x, self.g, shift=False)


def shift_and_norm(norm: nn.Module, x: Tensor, previous: Tensor | None = None) -> Tensor:
    """``norm`` of ``x (..., S, D)`` after the causal shift of half the channels.

    ``previous (..., D // 2)`` is the delayed half of the position before the first.
    """
    if is_plain(norm, RMSNorm):
        return shift_rms_norm(x, norm.g, previous)  # type: ignore[arg-type]
    out: Tensor = norm(shifted(x, previous, True))
    return out


class RotaryEmbedding(nn.Module):
    """Rotary positions of attention heads, base 10000, halves ``[-x2, x1]``.

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", frequencies(head_dim, 10_000))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RotaryEmbedding":
        """Move to another device; the angles stay float32 in a half precision model."""
        super()._apply(fn, recurse)
        self.inv_freq = frequencies(self.head_dim, 10_000, self.inv_freq.device)
        return self

    def forward(self, first: int, count: int) -> Rotary:
        """Cosines and sines of positions ``first .. first + count - 1``: (count, head_dim / 2)."""
        positions = torch.arange(first, first + count, device=self.inv_freq.device)
        angles = torch.outer(positions.float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary positions to queries or keys ``(B, H, S, d)``; those of each row where given."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Pre-norm multi-head attention; causal and shifted in a decoder, neither in an encoder."""

    def __init__(
        self, dim: int, *, head_dim: int, num_heads: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal
        inner = head_dim * num_heads
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def parts(self) -> Iterator[Part]:
        """What is in it, as built."""
        yield self.norm, RMSNorm
        yield from ((layer, nn.Linear) for layer in (self.to_q, self.to_kv, self.to_out))

    def heads(self, x: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, S, H, d)`` of ``x (B, S, D)``, not rotated yet."""
        x = shift_and_norm(self.norm, x, previous) if self.causal else self.norm(x)
        if is_plain(self.to_kv, nn.Linear) and self.to_kv.bias is None:
            # Keys and values apart: one tensor for both would stay in memory for the values' sake.
            k, v = (linear(x, weight) for weight in self.to_kv.weight.chunk(2))
        else:
            k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1))
            for projected in (apply(self.to_q, x), k, v)
        )
        return q, k, v

    def project(
        self, x: Tensor, rotary: Rotary | None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, H, S, d)`` of ``x (B, S, D)``, rotated."""
        q, k, v = (heads.transpose(1, 2) for heads in self.heads(x, previous))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def attend_short(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None) -> Tensor:
        """Causal attention of what `heads` gave, without dropout, and the output projection.

        ``q (B, S, H, d)`` are the queries of the last S of the T positions of ``k`` and ``v``; T is
        at most `SHORT`, and ``rotary`` holds T positions.
        """
        if q.device.type == "cpu":
            return apply(self.to_out, short_attention(q, k, v, rotary).flatten(-2))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if rotary is not None:
            cos, sin = rotary
            first = k.shape[2] - q.shape[2]
            q, k = rotate(q, (cos[first:], sin[first:])), rotate(k, rotary)
        return self.attend(q, k, v, is_causal=True)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Softmax attention, scale ``d**-0.5``, and the output projection: ``(B, S, D)``.

        ``mask``, True = attend, is broadcast to ``(B, H, S, T)``. With ``is_causal`` the
        queries are those of the last positions of the keys.
        """
        count, total = q.shape[2], k.shape[2]
        dropout = self.dropout if self.training else 0.0
        is_causal = is_causal and count > 1
        if is_causal and not dropout and total <= SHORT and q.device.type == "cpu":
            out = short_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return apply(self.to_out, out.flatten(-2))
        if is_causal and count < total:
            every = torch.ones(count, total, dtype=torch.bool, device=q.device)
            mask, is_causal = every.tril_(total - count), False
        if is_transformed():  # of which PyTorch's kernels do not know
            if mask is not None:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            out, _ = torch._scaled_dot_product_attention_math(q, k, v, mask, dropout, is_causal)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return apply(self.to_out, out.transpose(1, 2).flatten(-2))

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None = None,
        *,
        previous: Tensor | None = None,
        extend: Extend | None = None,
    ) -> Tensor:
        """Attend within ``x (B, S, D)`` and, where decoding, to the positions before.

        Args:
            x: ``(B, S, D)``.
            rotary: Rotary positions of ``x``, if any.
            mask: Which positions an encoder attends to, bool ``(B, S)``.
            previous: What the shift takes from the position before, ``(B, D // 2)``.
            extend: Keeps the keys and values; see `Extend`.
        """
        if extend is not None:
            q, k, v = self.project(x, rotary, previous)
            k, v, mask = extend(k, v)
            return self.attend(q, k, v, mask, is_causal=mask is None)
        if self.causal and 1 < x.shape[1] <= SHORT and not (self.training and self.dropout):
            return self.attend_short(*self.heads(x), rotary)
        q, k, v = self.project(x, rotary)
        if mask is not None:
            # A row with nothing to attend to is the average over all positions, and has no
            # gradient but that of the values: queries of zero attend so.
            nothing = ~mask.any(-1)[:, None, None, None]
            q, mask = q.masked_fill(nothing, 0), mask[:, None, None] | nothing
        return self.attend(q, k, v, mask, is_causal=self.causal)


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward: norm (shifted in a decoder), Linear, GELU, dropout, Linear."""

    def __init__(self, dim: int, *, mult: int, dropout: float, shift: bool) -> None:
        super().__init__(
            RMSNorm(dim),
            nn.Linear(dim, dim * mult),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim * mult, dim),
        )
        self.shift = shift

    def parts(self) -> Iterator[Part]:
        """What is in it, as built."""
        yield from parts_in(self, RMSNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Linear)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Map ``(B, S, D)`` to ``(B, S, D)``; ``previous`` as in `shift_and_norm`."""
        norm, *layers = self
        x = shift_and_norm(norm, x, previous) if self.shift else norm(x)
        for layer in layers:
            x = apply(layer, x)
        return x
