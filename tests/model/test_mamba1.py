"""Mamba-1 against mambapy."""

import pytest
import torch
from mambapy.mamba import Mamba, MambaConfig

from mblm.model.mamba1 import Mamba1

SIZES = {"model_dim": 32, "num_layers": 2, "d_state": 8, "d_conv": 4, "expand": 2}


def make_pair() -> tuple[Mamba1, Mamba]:
    torch.manual_seed(0)
    ours = Mamba1(**SIZES)
    torch.manual_seed(0)
    theirs = Mamba(MambaConfig(d_model=32, n_layers=2, d_state=8, d_conv=4, expand_factor=2))
    return ours, theirs


def test_parameters_are_those_of_mambapy() -> None:
    ours, theirs = make_pair()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 65])
def test_forward_and_gradients_equal_mambapy(length: int) -> None:
    ours, theirs = make_pair()
    x = torch.randn(3, length, 32)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)

    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Mamba1(**(SIZES | {name: 0}))
