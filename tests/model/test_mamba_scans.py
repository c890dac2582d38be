"""How mamba_ssm is looked for: absent, broken, present; and what its kernels are made of."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mblm.model.mamba_scans import _mamba1_by, _mamba2_by, _mamba_ssm
from mblm.ops.selective_scan import selective_scan
from mblm.ops.ssd import ssd

MODULE = "mamba_ssm.ops.some_module"


@pytest.fixture(autouse=True)
def fresh_search() -> Iterator[None]:
    _mamba_ssm.cache_clear()
    yield
    _mamba_ssm.cache_clear()


def find(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    spec = importlib.util.spec_from_loader("mamba_ssm", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


def test_absent_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=False)
    assert _mamba_ssm(MODULE, "function") is None


def test_broken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.warns(UserWarning, match="mamba_ssm is installed but .* cannot be imported"):
        assert _mamba_ssm(MODULE, "function") is None


def test_present_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=True)
    module = ModuleType(MODULE)
    module.function = len
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert _mamba_ssm(MODULE, "function") is len


class _Once(torch.autograd.Function):
    """A scan whose gradient cannot be differentiated, as those of mamba_ssm; the state has none."""

    @staticmethod
    def forward(ctx: Any, scan: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.scan = scan
        ctx.save_for_backward(*inputs)
        y, state = scan(*inputs)
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            y, _ = ctx.scan(*own)
        return None, *(g.detach() for g in torch.autograd.grad(y, own, grad.detach()))


def selective_scan_fn(*inputs: Tensor, return_last_state: bool) -> tuple[Tensor, Tensor]:
    """As mamba_ssm's."""
    assert return_last_state

    def scan(x: Tensor, delta: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        rates, weight_in, weight_out, direct = rest
        y, state = selective_scan(x.mT, delta.mT, rates, weight_in.mT, weight_out.mT, direct)
        return y.mT, state

    return _Once.apply(scan, *inputs)


def mamba_chunk_scan_combined(x: Tensor, dt: Tensor, *rest: Any, **options: Any) -> Any:
    """As mamba_ssm's."""
    rates, weight_in, weight_out, chunk_size = rest
    state, direct = options.pop("initial_states"), options.pop("D")
    assert options == {"return_final_states": True} and chunk_size == 256 and state is None
    return _Once.apply(ssd, x, dt, rates, weight_in.squeeze(2), weight_out.squeeze(2), direct)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_kernels_give_what_the_operators_do_and_no_second_derivatives(kind: str) -> None:
    if kind == "mamba1":
        shapes = [(2, 5, 3), (2, 5, 3), (3, 4), (2, 5, 4), (2, 5, 4), (3,)]
    else:
        shapes = [(2, 5, 3, 2), (2, 5, 3), (3,), (2, 5, 4), (2, 5, 4), (3,)]
    inputs: Any = [torch.randn(shape) for shape in shapes]
    inputs[1], inputs[2] = inputs[1].exp(), -inputs[2].exp()
    inputs = [t.requires_grad_() for t in inputs]

    def by_kernel() -> tuple[Tensor, Tensor]:
        if kind == "mamba1":
            return _mamba1_by(selective_scan_fn, *inputs)
        return _mamba2_by(mamba_chunk_scan_combined, inputs, None)

    results, expected = by_kernel(), (selective_scan if kind == "mamba1" else ssd)(*inputs)
    torch.testing.assert_close(results, expected)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y, _ in (results, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(by_kernel()[0].sum(), inputs, create_graph=True)
