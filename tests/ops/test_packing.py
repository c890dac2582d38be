"""Linear layers' weights as compiled code reads them."""

import pytest
import torch

from mblm.ops.packing import pack_linear, round_weight
from mblm.utils.huge_pages import HugePages


def as_packed(n: int, k: int) -> tuple[torch.nn.Linear, list[torch.Tensor]]:
    torch.manual_seed(n + 1000 * k)
    linear = torch.nn.Linear(k, n)
    return linear, pack_linear(linear, "int8", HugePages())


def as_rows(tiles: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The weight ``(N, K)`` of tiles, which hold nothing else."""
    filled = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    assert not filled[n:].any() and not filled[:, k:].any()
    return filled[:n, :k]


@pytest.mark.parametrize(("n", "k"), [(32, 4), (1, 1), (33, 65), (257, 128), (8, 200)])
def test_int8_weights_lie_in_tiles_of_32_rows_and_4_columns(n: int, k: int) -> None:
    linear, (tiles, scale, bias) = as_packed(n, k)
    rows, same_scale = round_weight(linear.weight.detach(), "int8")
    assert torch.equal(scale, same_scale) and torch.equal(bias, linear.bias)
    assert tiles.shape == (-(-n // 32), -(-k // 4), 32, 4)
    assert torch.equal(as_rows(tiles, n, k), rows)


class TestHugePages:
    def test_keep_copies_one_behind_the_other_at_a_pages_beginning(self) -> None:
        memory = HugePages()
        given = [torch.randn(300, 1001), torch.randn(400, 999).bfloat16()]
        kept = [memory.keep(tensor) for tensor in given]
        assert all(map(torch.equal, kept, given))
        assert kept[0].data_ptr() % (2 << 20) == 0
        behind = kept[1].data_ptr() - kept[0].data_ptr() - kept[0].nbytes
        assert 0 <= behind < 64 and kept[1].data_ptr() % 64 == 0
        kept[0].zero_()
        assert torch.equal(kept[1], given[1]) and given[0].any()

    def test_a_tensor_larger_than_what_is_mapped_at_once(self) -> None:
        memory = HugePages()
        first, large = memory.keep(torch.ones(1 << 17)), torch.arange(17 << 20)
        assert torch.equal(memory.keep(large), large)
        del memory, large
        assert first.sum() == 1 << 17

    def test_a_small_one_stays_where_it_is(self) -> None:
        small = torch.ones(10)
        assert HugePages().keep(small) is small
