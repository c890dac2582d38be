"""``short_attention``: rotary positions and causal attention of many short sequences."""

import torch
from torch import Tensor

from mblm.ops._library import compute_dtype, register_operator
from mblm.utils.modes import without_autocast

# The longest sequence that the operator takes: one head's work stays in a core's cache.
MAX_POSITIONS = 64


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Rotate queries and keys, then attend causally, with the scale ``d**-0.5``.

    The S queries are those of the last positions of the T keys: query ``i`` sees the keys up to
    ``T - S + i``. Rotary positions as in RoFormer (Su et al., https://arxiv.org/abs/2104.09864,
    section 3.2), with halves ``[-x2, x1]``. Computed in float32 (float64 for float64) and rounded
    once. Differentiable in q, k and v; the backward pass computes the probabilities again.

    Args:
        q: (B, S, H, d), floating point, any strides.
        k, v: (B, T, H, d) of q's dtype, ``S <= T <= 64``, any strides.
        rotary: Cosines and sines of the T positions, (T, d / 2) float32 each; none if None.

    Returns:
        (B, S, H, d) of q's dtype, contiguous.
    """
    cos, sin = (None, None) if rotary is None else rotary
    out: Tensor = torch.ops.mblm.short_attention(q, k, v, cos, sin)
    return out


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate (B, H, S, d) to the positions of the last S rows of the tables."""
    if cos is None or sin is None:
        return x
    cos, sin = (table[table.shape[0] - x.shape[2] :] for table in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def short_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """The specification of the native kernel."""
    with without_autocast(q.device.type):
        queries, keys, values = (x.transpose(1, 2).to(compute_dtype(q.dtype)) for x in (q, k, v))
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        scores = queries @ keys.mT * max(q.shape[-1], 1) ** -0.5  # (B, H, S, T)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        later = later.triu_(k.shape[1] - q.shape[1] + 1)
        out = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
        return out.transpose(1, 2).to(q.dtype).contiguous()


_ARGUMENTS = (
    "q: B S H d float, k: B T H d q, v: B T H d q, q: B <=T H d float, cos: T d/2 float32, "
    "sin: T d/2 float32"
)
register_operator(
    "short_attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin) -> Tensor",
    short_attention_reference,
    "short_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cos, "
    "Tensor? sin) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    arguments=_ARGUMENTS,
    gradient_arguments=f"{_ARGUMENTS}, grad: B S H d q",
)
