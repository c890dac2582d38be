"""Short attention: against torch's own, its gradients, its native kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.model.transformer_layers import RotaryEmbedding, rotate
from mblm.ops.short_attention import short_attention, short_attention_reference
from tests.ops.samples import reference_of

OPERATOR = torch.ops.mblm.short_attention
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [OPERATOR, short_attention_reference], ids=["operator", "reference"]
)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Rotary = tuple[Tensor, Tensor]


def make_arguments(
    rows: int, queries: int, keys: int, heads: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(positions: int) -> Tensor:
        shape = (rows, positions, heads, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(queries), draw(keys), draw(keys)


def tables(keys: int, width: int) -> Rotary:
    return RotaryEmbedding(width)(0, keys)


@IMPLEMENTATIONS
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (64, 64), (1, 7), (8, 9)])
def test_equals_torch_attention(
    implementation: Callable[..., Tensor], queries: int, keys: int, rotary: bool
) -> None:
    arguments = make_arguments(2, queries, keys, 3, 8)
    cos, sin = tables(keys, 8) if rotary else (None, None)

    out = implementation(*arguments, cos, sin)

    q, k, v = (t.transpose(1, 2) for t in arguments)
    if rotary:
        q = rotate(q, (cos[keys - queries :], sin[keys - queries :]))
        k = rotate(k, (cos, sin))
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_large_scores_stay_finite() -> None:
    q, k, v = make_arguments(1, 9, 9, 2, 4, torch.float32)
    q = (q * 1e4).requires_grad_()
    out = short_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3]),
    queries=st.one_of(st.integers(0, 10), st.sampled_from([31, 60])),
    more_keys=st.sampled_from([0, 1, 4]),
    heads=st.sampled_from([0, 1, 3]),
    width=st.sampled_from([0, 1, 2, 8, 10, 67, 136]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    rotary=st.booleans(),
    layout=st.sampled_from(["contiguous", "heads first", "every other channel", "one row"]),
)
def test_native_equals_reference(
    require_native: Callable[[str], None],
    rows: int,
    queries: int,
    more_keys: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    rotary: bool,
    layout: str,
) -> None:
    require_native("short_attention")
    require_native("short_attention_backward")
    keys = queries + more_keys
    arguments = make_arguments(rows, queries, keys, heads, width, dtype)
    if layout == "heads first":
        arguments = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments)
    elif layout == "every other channel":
        arguments = tuple(t.repeat_interleave(2, dim=-1)[..., ::2] for t in arguments)
    elif layout == "one row":
        arguments = tuple(t[:1].expand_as(t) for t in arguments)
    cos, sin = tables(keys, width) if rotary and width % 2 == 0 else (None, None)
    grad = torch.randn_like(arguments[0])

    inputs = (*arguments, cos, sin)
    ours = (OPERATOR(*inputs), *torch.ops.mblm.short_attention_backward(grad, *inputs))
    theirs = (
        short_attention_reference(*inputs),
        *reference_of("short_attention_backward")(grad, *inputs),
    )

    for name, one, other in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert one.is_contiguous() and other.is_contiguous(), name
        bound = TOLERANCE[dtype]
        scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
