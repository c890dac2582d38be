"""Softmax attention by products that form the scores, and by PyTorch's kernels."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.utils.transforms import is_transformed


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float) -> Tensor:
    """``softmax(q kᵀ d**-0.5) v``, by products that form the scores.

    Args:
        q: Queries ``(B, H, S, d)``.
        k, v: Keys and values ``(B, H, T, d)``.
        mask: bool, True = attend, broadcast to ``(B, H, S, T)``.
        dropout: Of the probabilities.

    Returns:
        ``(B, H, S, d)``.
    """
    bias = q.new_zeros(() if mask is None else mask.shape)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    scores = torch.baddbmm(
        bias.expand(*q.shape[:3], k.shape[2]).flatten(0, 1),
        q.flatten(0, 1),
        k.flatten(0, 1).transpose(1, 2),
        alpha=q.shape[-1] ** -0.5,
    )
    probabilities = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(probabilities, v.flatten(0, 1)).view_as(q)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, is_causal: bool
) -> Tensor:
    """`attention` by the kernel that PyTorch chooses, whose memory does not grow with ``S T``.

    ``is_causal`` is for as many queries as keys; then there is no mask. Second derivatives are
    those that the kernel has; transforms are of `attention`.
    """
    if is_transformed():
        return attention(q, k, v, causal_mask(q, k) if is_causal else mask, dropout=dropout)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """bool ``(S, T)``, True = attend, where the queries are those of the last positions."""
    count, total = q.shape[2], k.shape[2]
    return torch.ones(count, total, dtype=torch.bool, device=q.device).tril_(total - count)
