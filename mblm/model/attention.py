"""Softmax attention by PyTorch's kernels, and by plain products where those have no derivatives."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._library import derived_gradients
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

    The kernels have neither second derivatives nor forward-mode AD: these are of the scores, formed
    for them. So it is without dropout, outside of `torch.compile`, and where tensors are saved
    for the backward pass as they are; else PyTorch raises.

    ``is_causal`` is for as many queries as keys; then there is no mask.
    """
    if is_transformed():
        return attention(q, k, v, causal_mask(q, k) if is_causal else mask, dropout=dropout)
    if (
        dropout
        or not torch.is_grad_enabled()
        or not (q.requires_grad or k.requires_grad or v.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
    ):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)

    def derivable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal_mask(q, k) if is_causal else mask, dropout=0.0)

    gate = _Gate(derivable)
    q, k, v = _Entry.apply(gate, q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal)
    return _Exit.apply(gate, out)


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """bool ``(S, T)``, True = attend, where the queries are those of the last positions."""
    count, total = q.shape[2], k.shape[2]
    return torch.ones(count, total, dtype=torch.bool, device=q.device).tril_(total - count)


class _Gate:
    """What is around a function whose gradient cannot be differentiated.

    Where a backward pass is to be differentiated, the gradient that comes in at the exit goes out
    at the entry as that of ``derivable``; what the function makes of it between is left alone.
    """

    def __init__(self, derivable: Callable[..., Tensor]) -> None:
        self.derivable = derivable
        self.grad: Tensor | None = None


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.save_for_backward(*inputs)
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate: _Gate = ctx.gate
        grad, gate.grad = gate.grad, None
        if grad is None:
            return None, *grads
        needed = ctx.needs_input_grad[1:]
        return None, *derived_gradients(gate.derivable, ctx.saved_tensors, needed, [grad])


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, out: Tensor) -> Tensor:
        ctx.gate = gate
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_transformed():
            ctx.gate.grad = grad
        return None, grad
