"""``gated_rms_norm``: RMSNorm with the gate of Mamba-2 before it, in one pass over activations."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._checks import (
    check_device,
    check_floating,
    check_like,
    check_shape,
    compute_dtype,
)
from mblm.ops._library import gradients_of, register_operator


def gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Multiply by the SiLU of the gate, then apply RMSNorm.

    With ``g = x silu(gate)``, or ``g = x`` without a gate, the result is
    ``g / sqrt(mean(g²) + eps) * weight`` (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467;
    the gate as in Dao and Gu 2024, https://arxiv.org/abs/2405.21060). Differentiable in every
    tensor argument.

    Args:
        x: ``(..., D)``, floating point, any strides.
        weight: ``(D,)``, floating point.
        gate: ``(..., D)`` of x's dtype, any strides; None for a plain RMSNorm.
        eps: Added to the mean of the squares, positive.

    Returns:
        ``(..., D)``, contiguous, of weight's dtype. Computed in float32 (in float64 if x or weight
        is float64) and rounded once.

    Raises:
        TypeError: A dtype is not floating point, or ``gate`` has another than ``x``.
        ValueError: A shape or a device does not fit, or ``eps`` is not positive.
    """
    out: Tensor = torch.ops.mblm.gated_rms_norm(x, weight, gate, eps)[0]
    return out


def gated_rms_norm_reference(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and ``1 / sqrt(mean(g²) + eps)``, ``(...)``, for backward."""
    _check(x, weight, gate, eps)
    compute = _compute(x, weight)
    gated = x.to(compute)
    if gate is not None:
        gated = gated * F.silu(gate.to(compute))
    inverse_norm = gated.square().mean(-1).add_(eps).rsqrt_()
    out = gated * inverse_norm[..., None] * weight.to(compute)
    return out.to(weight.dtype).contiguous(), inverse_norm.contiguous()


def gated_rms_norm_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    inverse_norm: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, ``weight`` and ``gate`` (empty if that is None)."""
    inputs, kept = (x, weight, gate, eps), {"inverse_norm": inverse_norm}
    grads = gradients_of(3, gated_rms_norm_reference, inputs, {"grad": grad}, **kept)
    return grads if gate is not None else (*grads, x.new_empty(0))


def _compute(x: Tensor, weight: Tensor) -> torch.dtype:
    return compute_dtype(torch.promote_types(x.dtype, weight.dtype))


def _check(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D >= 1, got {list(x.shape)}")
    check_shape("weight", weight, (x.shape[-1],))
    check_device("weight", weight, "x", x)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if gate is not None:
        check_shape("gate", gate, tuple(x.shape))
        check_like("gate", gate, "x", x)


register_operator(
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? gate, float eps) "
    "-> (Tensor out, Tensor inverse_norm)",
    reference=gated_rms_norm_reference,
    derivable=gated_rms_norm_reference,
    backward="gated_rms_norm_backward",
    intermediates=1,
)
register_operator(
    "gated_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gate, "
    "Tensor inverse_norm, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_gate)",
    reference=gated_rms_norm_backward_reference,
)
