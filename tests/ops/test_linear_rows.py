"""``linear_rows``: what it does not share with ``linear``, of which test_linear.py has the rest."""

from collections.abc import Callable

import pytest
import torch

from mblm.ops.linear_rows import MAX_ROWS


@pytest.fixture
def native(require_native: Callable[[str], None]) -> None:
    require_native("linear_rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_among_others(native: None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(MAX_ROWS, 333).to(dtype), torch.randn(77, 333).to(dtype)
    together = torch.ops.mblm.linear_rows(x, weight, None)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        alone = torch.cat([torch.ops.mblm.linear_rows(row[None], weight, None) for row in x])
        torch.set_num_threads(before)
        assert torch.equal(together, alone)
