"""Short attention: against torch's own, its gradients, its native kernel, bad input."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mblm.model.transformer_layers import RotaryEmbedding, rotate
from mblm.ops import short_attention as module
from mblm.ops.short_attention import short_attention, short_attention_reference
from tests.ops.threads import assert_same_bits_for_any_threads

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


def test_no_position_sees_a_later_one() -> None:
    q, k, v = make_arguments(1, 9, 9, 2, 4, torch.float32)
    before = short_attention(q, k, v, tables(9, 4))
    for tensor in (q, k, v):
        tensor[:, 5:] *= -300
    after = short_attention(q, k, v, tables(9, 4))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).any()


def test_large_scores_stay_finite() -> None:
    q, k, v = make_arguments(1, 9, 9, 2, 4, torch.float32)
    q = (q * 1e4).requires_grad_()
    out = short_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (1, 1), (5, 5), (2, 5), (0, 3)])
def test_gradients(queries: int, keys: int, rotary: bool) -> None:
    arguments = [t.requires_grad_() for t in make_arguments(2, queries, keys, 2, 4)]
    table = tables(keys, 4) if rotary else None
    assert torch.autograd.gradcheck(lambda *a: short_attention(*a, table), arguments)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3]),
    queries=st.one_of(st.integers(0, 10), st.sampled_from([31, 60])),
    more_keys=st.sampled_from([0, 1, 4]),
    heads=st.sampled_from([0, 1, 3]),
    width=st.sampled_from([1, 2, 8, 10, 34]),
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
        *module.short_attention_backward_reference(grad, *inputs),
    )

    for name, one, other in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert one.is_contiguous() and other.is_contiguous(), name
        bound = TOLERANCE[dtype]
        scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(
            one, other, rtol=bound, atol=bound * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = (*make_arguments(40, 9, 9, 3, 16, torch.float32), *tables(9, 16))

    def compute() -> tuple[Tensor, ...]:
        out = OPERATOR(*arguments)
        return (out, *torch.ops.mblm.short_attention_backward(out, *arguments))

    assert_same_bits_for_any_threads(compute)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, ValueError, r"q must have shape \[B, S, H, d\]"),
        ({"q": torch.zeros(2, 5, 3, 4).long()}, TypeError, "q must be float16"),
        ({"q": torch.zeros(2, 7, 3, 4)}, ValueError, r"with 7 <= T <= 64, got \[2, 6, 3, 4\]"),
        ({"k": torch.zeros(2, 65, 3, 4)}, ValueError, r"with 5 <= T <= 64, got \[2, 65, 3, 4\]"),
        ({"k": torch.zeros(2, 6, 2, 4)}, ValueError, r"k must have shape \[2, 6, 3, 4\]"),
        ({"k": torch.zeros(2, 6, 3, 4).double()}, TypeError, "k must have the dtype of q"),
        ({"v": torch.zeros(2, 5, 3, 4)}, ValueError, r"v must have shape \[2, 6, 3, 4\]"),
        ({"v": torch.zeros(2, 6, 3, 4).half()}, TypeError, "v must have the dtype of q"),
        ({"sin": None}, ValueError, "cos and sin must be given both or not at all"),
        ({"cos": torch.zeros(5, 2)}, ValueError, r"cos must have shape \[6, 2\], got \[5, 2\]"),
        ({"sin": torch.zeros(6, 2).double()}, TypeError, "sin must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(
    implementation: Callable[..., Tensor],
    change: dict[str, Tensor | None],
    error: type[Exception],
    message: str,
) -> None:
    arguments = {
        "q": torch.zeros(2, 5, 3, 4),
        "k": torch.zeros(2, 6, 3, 4),
        "v": torch.zeros(2, 6, 3, 4),
        "cos": torch.zeros(6, 2),
        "sin": torch.zeros(6, 2),
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())


@IMPLEMENTATIONS
def test_odd_widths_have_no_rotary_positions(implementation: Callable[..., Tensor]) -> None:
    x, table = torch.zeros(1, 2, 1, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="even width d for rotary positions, got 3"):
        implementation(x, x, x, table, table)
