"""A kernel without second derivatives has those of the same function in PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mblm.model.derivatives import with_derivatives


class _Cube(torch.autograd.Function):
    """A kernel: ``x³``, whose gradient is a constant to PyTorch and may fail."""

    failing = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if _Cube.failing:
            raise RuntimeError("out of memory")
        (x,) = ctx.saved_tensors
        return grad * 3 * x.detach() ** 2


def cube(x: Tensor) -> Tensor:
    out: Tensor = with_derivatives(_Cube.apply, lambda x: x**3, x)
    return out


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, dtype=torch.float64, requires_grad=True)


def test_first_and_second_derivatives(x: Tensor) -> None:
    assert torch.autograd.gradcheck(cube, x)
    assert torch.autograd.gradgradcheck(cube, x)


def test_before_pytorch_tells_of_saved_tensors(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """So up to 2.7."""
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    assert torch.autograd.gradgradcheck(cube, x)


def test_what_is_offloaded_is_saved_once(x: Tensor) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cube(x).sum().backward()
    assert len(saved) == 1
    torch.testing.assert_close(x.grad, 3 * x.detach() ** 2)


def test_a_pass_that_failed_leaves_nothing_to_the_next(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = cube(x).sum()
    monkeypatch.setattr(_Cube, "failing", True)
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.autograd.grad(7 * y, x, create_graph=True)
    monkeypatch.setattr(_Cube, "failing", False)
    (grad,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(grad, 3 * x.detach() ** 2)
