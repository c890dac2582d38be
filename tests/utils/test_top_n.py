"""TopN: what it keeps, in which order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mblm.utils.top_n import TopN

VALUES = st.lists(st.floats(allow_nan=False), max_size=12)


@given(values=VALUES, n=st.integers(0, 5), largest=st.booleans())
def test_keeps_the_best_values_best_first(values, n, largest):
    top = TopN[str](n, top_largest=largest)
    for value in values:
        top.add((value, f"item of {value}"))
    expected = sorted(values, reverse=largest)[:n]
    assert [value for value, _ in top] == expected
    assert len(top) == len(expected)
    assert top.get_top(2) == top.get_top()[:2]
    assert all(item == f"item of {value}" for value, item in top)


def test_items_need_no_order_and_values_need_only_be_numbers():
    top = TopN[dict](2)
    for value in (torch.tensor(2.0), 1, True):
        top.add((value, {}))
    assert list(top) == [(1.0, {}), (1.0, {})]


def test_an_equal_value_does_not_replace_what_is_kept():
    top = TopN[str](1)
    top.add((1.0, "first"))
    top.add((1.0, "second"))
    assert list(top) == [(1.0, "first")]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("order", [(math.nan, 1.0, 2.0), (1.0, math.nan, 2.0)])
def test_nan_is_kept_only_while_there_is_room(order, largest):
    top = TopN[None](2, top_largest=largest)
    for value in order[:2]:
        top.add((value, None))
    (first, _), (second, _) = top
    assert first == 1.0 and math.isnan(second)
    top.add((order[2], None))
    assert {value for value, _ in top} == {1.0, 2.0}


def test_copies_only_if_asked_to():
    weights = torch.zeros(2)
    shared, copied = TopN[dict](1), TopN[dict](1, deep_copy=True)
    shared.add((1.0, {"w": weights}))
    copied.add((1.0, {"w": weights}))
    weights += 1
    assert shared.get_top()[0][1]["w"] is weights
    assert torch.equal(copied.get_top()[0][1]["w"], torch.zeros(2))


def test_what_is_no_size_is_refused():
    with pytest.raises(TypeError, match="n: expected an integer, got '3'"):
        TopN("3")
    with pytest.raises(ValueError, match="n: expected a number >= 0, got -1"):
        TopN(-1)
