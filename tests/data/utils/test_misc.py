"""Loss masks in a row, and values renumbered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.data.utils import shift_remap_tensor, target_loss_mask


def test_a_loss_mask_repeats_each_weight() -> None:
    parts = [(torch.zeros(2, dtype=torch.long), 0.5), (torch.zeros(0), 9), (torch.zeros(1), 2)]
    mask = target_loss_mask(iter(parts))
    assert mask.tolist() == [0.5, 0.5, 2.0]
    assert mask.dtype == torch.float32


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor_weight_pairs: expected at least one pair"):
        target_loss_mask([])


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.integers(0, 255), max_size=40), start=st.integers(0, 200))
def test_renumbering_keeps_the_order_and_can_be_undone(values: list[int], start: int) -> None:
    tensor = torch.tensor(values, dtype=torch.int16).reshape(-1, 1)
    shifted, olds, indices = shift_remap_tensor(tensor, start)
    assert (shifted.shape, shifted.dtype) == (tensor.shape, tensor.dtype)
    assert sorted(set(shifted.flatten().tolist())) == list(range(start, start + len(set(values))))
    assert torch.equal(olds[indices], tensor)
    assert torch.equal(olds[(shifted - start).long()], tensor)


@pytest.mark.parametrize("start", [254, -1, 300])
def test_values_that_do_not_fit_are_refused(start: int) -> None:
    tensor = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"range_start: 3 values from {start} do not fit .*uint8"):
        shift_remap_tensor(tensor, start)
    assert shift_remap_tensor(tensor, 253)[0].tolist() == [253, 254, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_are_renumbered_too(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.5, 2.0, -1.0, 0.5], dtype=dtype)
    shifted, olds, indices = shift_remap_tensor(tensor, 7)
    assert shifted.dtype == dtype and shifted.tolist() == [8.0, 9.0, 7.0, 8.0]
    assert torch.equal(olds[indices], tensor)


def test_floats_that_cannot_tell_the_new_values_apart_are_refused() -> None:
    tensor = torch.tensor([1.0, 2.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"2 values from 2048 do not fit into torch.float16"):
        shift_remap_tensor(tensor, 2048)
