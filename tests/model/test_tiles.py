"""Sums and maps over tiles: equal to those without, gradients included; memory; what is refused."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mblm.model.gradients import GradientSums
from mblm.model.recomputation import run_in_segments
from mblm.model.tiles import sum_over_tiles
from tests.model.peak_memory import peak_bytes

SIZES = [1, 2, 3, 6, 7, 100]


class Net(nn.Module):
    """Squares of a linear map, weighted; entries that are 0 do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        losses = self.linear(rows).square().sum(-1)
        losses = losses if weights is None else losses * weights
        return losses.sum(), losses.count_nonzero()

    def sum(self, size: int, rows: Tensor, *others: Tensor | None, **how: Any) -> Tensor:
        sums = GradientSums(self.parameters())
        total, count = sum_over_tiles(self, size, rows, others, sums, **how)
        assert not count.requires_grad
        return total / count


@pytest.fixture
def net() -> Net:
    return Net().double()


def rows_and_weights() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 4).double().requires_grad_(), torch.tensor([1, 0, 2, 1, 0, 0, 3.0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_and_its_gradients_are_those_without_tiles(
    net: Net, size: int, recompute: bool
) -> None:
    rows, weights = rows_and_weights()
    total, count = net(rows, weights)
    expected = torch.autograd.grad(total / count, [rows, *net.linear.parameters()])
    loss = net.sum(size, rows, weights, recompute=recompute)
    torch.testing.assert_close(loss, total / count)
    loss.backward()
    actual = [rows.grad, *(p.grad for p in net.linear.parameters())]
    torch.testing.assert_close(actual, [*expected])
    assert net.unused.grad is None


def test_gradients_of_another_computation_are_no_part_of_the_sums(net: Net) -> None:
    """Such as another thread's, or one within the backward pass, with the same parameters."""
    others: list[Tensor] = []

    def function(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        total, count = net(rows, weights)

        @torch.enable_grad()
        def compute_another(_: Tensor) -> None:
            others.append(torch.autograd.grad(net(rows)[0], net.linear.weight)[0])

        total.register_hook(compute_another)
        return total, count

    rows, weights = rows_and_weights()
    expected = torch.autograd.grad(net(rows, weights)[0], net.linear.weight)
    total, _ = sum_over_tiles(function, 7, rows, (weights,), GradientSums(net.parameters()))
    torch.testing.assert_close(torch.autograd.grad(total, net.linear.weight), expected)
    torch.testing.assert_close(others[0], torch.autograd.grad(net(rows)[0], net.linear.weight)[0])


def test_tiles_that_need_no_gradient_do_not_disturb_others(net: Net) -> None:
    """A function may leave a tile without a graph, such as one of padding alone."""

    def function(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows if rows.sum() > 0 else rows.detach()
        return rows.sum(), rows.count_nonzero()

    rows = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    sum_over_tiles(function, 1, rows, (), GradientSums(()))[0].backward()
    assert rows.grad is not None and rows.grad.tolist() == [[0], [1]]


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_no_result_of_a_tile_outlives_it(net: Net, needs_gradient: bool) -> None:
    """Small blocks between large ones that are freed keep malloc from using those again."""
    results: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def sum_and_count(rows: Tensor) -> tuple[Tensor, Tensor]:
        alive.append(sum(result() is not None for result in results))
        total, count = net(rows)
        results.extend((weakref.ref(total), weakref.ref(count)))
        return total, count

    net.requires_grad_(needs_gradient)
    sum_over_tiles(sum_and_count, 1, torch.randn(7, 4).double(), [], GradientSums(net.parameters()))
    assert len(alive) == 7
    assert max(alive) <= 2, "at most those of the tile before, until this one's take their place"


def test_many_small_gradients_add_up_in_half_precision() -> None:
    """A sum kept in bfloat16 would stop at 256 ones."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    rows = torch.ones(2000, 1, dtype=torch.bfloat16)

    def function(rows: Tensor) -> tuple[Tensor, Tensor]:
        losses = rows * weight
        return losses.sum(dtype=torch.float32), losses.count_nonzero()

    total, count = sum_over_tiles(function, 1, rows, (), GradientSums([weight]))
    total.backward()
    assert (total.item(), count.item()) == (2000, 2000)
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad.item() == 2000


def test_a_second_backward_pass_is_refused(net: Net) -> None:
    rows, weights = rows_and_weights()
    loss = net.sum(2, rows, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_tensor_whose_gradient_would_be_lost_is_refused(net: Net) -> None:
    rows, _ = rows_and_weights()
    with pytest.raises(ValueError, match=r"tensor \(3, 4\) .* none of the model's parameters"):
        sum_over_tiles(net, 2, rows, (), GradientSums([net.linear.bias]))


def map_with_sums(
    function: Callable[[Tensor], Tensor], size: int, rows: Tensor, sums: GradientSums
) -> Tensor:
    """`map_over_tiles` by a function whose gradients are added up, as the patches' embedding."""
    return run_in_segments(lambda x, _: (function(x[0])[None], ()), sums, rows[None], size)[0]


class TestMemoryOfGradients:
    """In bytes: the sums, and little else."""

    SIZE, LAYERS = 256, 6
    WEIGHT = 4 * SIZE * SIZE

    def test_of_many_weights(self) -> None:
        layers = nn.Sequential(*[nn.Linear(self.SIZE, self.SIZE) for _ in range(self.LAYERS)])
        rows = torch.randn(8, self.SIZE)

        def function(rows: Tensor) -> tuple[Tensor, Tensor]:
            out = layers(rows)
            return out.sum(), out.count_nonzero()

        sums = GradientSums(layers.parameters())
        peak = peak_bytes(lambda: sum_over_tiles(function, 2, rows, (), sums)[0].backward())
        assert self.LAYERS * self.WEIGHT < peak < (self.LAYERS + 2) * self.WEIGHT

    def test_of_one_large_weight(self) -> None:
        layer, rows = nn.Linear(self.SIZE, self.SIZE), torch.randn(8, self.SIZE)
        sums = GradientSums(layer.parameters())

        def step() -> None:
            map_with_sums(lambda tile: sums.linear(layer, tile), 2, rows, sums).sum().backward()

        assert self.WEIGHT < peak_bytes(step) < 1.5 * self.WEIGHT


def test_a_failure_leaves_no_gradients_behind(net: Net) -> None:
    rows, weights = rows_and_weights()
    sums = GradientSums(net.parameters())

    def failing(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if weights[0] == 2:
            raise KeyboardInterrupt
        return net(rows, weights)

    with pytest.raises(KeyboardInterrupt):
        sum_over_tiles(failing, 2, rows, (weights,), sums)
    total, _ = sum_over_tiles(net, 2, rows, (weights,), sums)
    expected = torch.autograd.grad(net(rows, weights)[0], net.linear.weight)
    torch.testing.assert_close(torch.autograd.grad(total, net.linear.weight), expected)
