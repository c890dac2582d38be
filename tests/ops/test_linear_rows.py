"""``linear_rows``: the native kernel against the reference."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.ops.linear_rows import MAX_ROWS, linear_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}


@pytest.fixture
def native(require_native: Callable[[str], None]) -> None:
    require_native("linear_rows")


@given(
    rows=st.integers(0, 9),
    inputs=st.integers(0, 70),
    outputs=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    strided=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, with_bias: bool, strided: bool
) -> None:
    x = torch.randn(inputs, rows).t() if strided else torch.randn(rows, inputs)
    weight = torch.randn(outputs, 2 * inputs)[:, ::2] if strided else torch.randn(outputs, inputs)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    expected = linear_reference(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    actual = torch.ops.mblm.linear_rows(x, weight, bias)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_row_has_the_same_bits_alone_and_among_others(native: None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(MAX_ROWS, 333).to(dtype), torch.randn(77, 333).to(dtype)
    together = torch.ops.mblm.linear_rows(x, weight, None)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        alone = torch.cat([torch.ops.mblm.linear_rows(row[None], weight, None) for row in x])
        torch.set_num_threads(before)
        assert torch.equal(together, alone)


def test_the_operator_has_no_gradient() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linear_rows has no gradient"):
        torch.ops.mblm.linear_rows(x, torch.randn(2, 3), None).sum().backward()


def test_opcheck() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    for arguments in ((x, weight, bias), (x, weight, None)):
        torch.library.opcheck(torch.ops.mblm.linear_rows.default, arguments)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "words"),
    [
        (torch.zeros(5), torch.zeros(4, 5), None, ValueError, "x must have two dimensions"),
        (torch.zeros(1, 5), torch.zeros(5), None, ValueError, "weight must have two dimensions"),
        (torch.zeros(1, 5), torch.zeros(4, 6), None, ValueError, "weight must have shape"),
        (torch.zeros(1, 5), torch.zeros(4, 5), torch.zeros(3), ValueError, "bias must have shape"),
        (torch.zeros(1, 5), torch.zeros(4, 5).double(), None, TypeError, "weight must have the"),
        (torch.zeros(1, 5).long(), torch.zeros(4, 5), None, TypeError, "x must be"),
    ],
)
def test_bad_input_is_refused(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    error: type[Exception],
    words: str,
) -> None:
    for function in (torch.ops.mblm.linear_rows, linear_reference):
        with pytest.raises(error, match=words):
            function(x, weight, bias)
