"""``shift_rms_norm``: the causal shift fused with RMSNorm, in one pass over the activations."""

import torch
from torch import Tensor

from mblm.ops._library import compute_dtype, register_operator


def shift_rms_norm(
    x: Tensor,
    weight: Tensor,
    previous: Tensor | None = None,
    *,
    shift: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Delay the last half of the channels by one position, then apply RMSNorm.

    With ``h = D - D // 2`` and ``s[t] = concat(x[t, :h], x[t - 1, h:])``, the result is
    ``s / max(norm(s) * D**-0.5, eps) * weight``. At ``t = 0`` the delayed half is ``previous``.
    The shift is RWKV's token shift as MEGABYTE uses it; RMSNorm is Zhang & Sennrich's (2019)
    with the epsilon as a lower bound of the root mean square.

    Args:
        x: ``(..., S, D)``, any strides.
        weight: ``(D,)``.
        previous: ``(..., D // 2)``, the delayed half that enters at the first position, of the
            dtype of ``x``; zeros if None. Decoding passes the last position's ``x[..., h:]``.
        shift: False leaves the channels where they are: a plain RMSNorm.
        eps: Lower bound of the root mean square, positive.

    Returns:
        ``(..., S, D)``, contiguous, of the dtype ``torch.result_type(x, weight)``. Computed in
        float32 (in float64 if that is the result's dtype) and rounded once.
    """
    out: Tensor = torch.ops.mblm.shift_rms_norm(x, weight, previous, shift, eps)[0]
    return out


def shift_rms_norm_reference(
    x: Tensor, weight: Tensor, previous: Tensor | None, shift: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the result and ``1 / max(norm(s) * D**-0.5, eps)``, ``(..., S)``, for backward."""
    dtype = torch.result_type(x, weight)
    compute = compute_dtype(dtype)
    s = shifted(x, previous, shift).to(compute)
    measured = s
    if s.requires_grad:  # the second derivative of a norm of 0, which eps bounds, would be NaN
        measured = s.masked_fill((s == 0).all(-1, keepdim=True), eps / 2)
    norm = torch.linalg.vector_norm(measured, dim=-1) * x.shape[-1] ** -0.5
    inverse_norm = 1 / norm.clamp(min=eps)
    out = s * inverse_norm[..., None] * weight.to(compute)
    return out.to(dtype).contiguous(), inverse_norm.contiguous()


def shifted(x: Tensor, previous: Tensor | None, shift: bool) -> Tensor:
    """What `shift_rms_norm` normalizes, ``(..., S, D)``."""
    if not shift:
        return x
    half = x.shape[-1] // 2
    kept, delayed = x.split((x.shape[-1] - half, half), dim=-1)
    first = previous if previous is not None else delayed.new_zeros(*x.shape[:-2], half)
    delayed = torch.cat((first[..., None, :], delayed), dim=-2)[..., : x.shape[-2], :]
    return torch.cat((kept, delayed), dim=-1)


_ARGUMENTS = "x: .. S D float, weight: D float, previous: .. D/2 x, eps: > 0"
register_operator(
    "shift_rms_norm(Tensor x, Tensor weight, Tensor? previous, bool shift, float eps) "
    "-> (Tensor out, Tensor inverse_norm)",
    shift_rms_norm_reference,
    "shift_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? previous, "
    "Tensor inverse_norm, bool shift, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_previous)",
    arguments=_ARGUMENTS,
    gradient_arguments=f"{_ARGUMENTS}, grad: .. S D float, inverse_norm: .. S computed",
    intermediates=1,
)
