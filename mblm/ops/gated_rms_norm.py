"""``gated_rms_norm``: RMSNorm with the gate of Mamba-2 before it, in one pass over activations."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mblm.ops._library import compute_dtype, register_operator


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
    """
    out: Tensor = torch.ops.mblm.gated_rms_norm(x, weight, gate, eps)[0]
    return out


def gated_rms_norm_reference(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and ``1 / sqrt(mean(g²) + eps)``, ``(...)``, for backward."""
    compute = compute_dtype(torch.promote_types(x.dtype, weight.dtype))
    gated = x.to(compute)
    if gate is not None:
        gated = gated * F.silu(gate.to(compute))
    inverse_norm = gated.square().mean(-1).add_(eps).rsqrt_()
    out = gated * inverse_norm[..., None] * weight.to(compute)
    return out.to(weight.dtype).contiguous(), inverse_norm.contiguous()


_ARGUMENTS = "x: .. D float, weight: D float, gate: .. D x, eps: > 0"
register_operator(
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? gate, float eps) "
    "-> (Tensor out, Tensor inverse_norm)",
    gated_rms_norm_reference,
    "gated_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gate, "
    "Tensor inverse_norm, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_gate)",
    arguments=_ARGUMENTS,
    gradient_arguments=f"{_ARGUMENTS}, grad: .. D weight, inverse_norm: .. computed",
    intermediates=1,
)
