"""Tensors made for later use are of use in every mode."""

from typing import Any

import pytest
import torch

from mblm.utils.modes import lasting_tensors, own_copy


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_made_lasts_and_the_mode_goes_on(mode: Any) -> None:
    weight = torch.ones(3, requires_grad=True)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with lasting_tensors():
            made = weight * 2
        copied = own_copy(torch.ones(3))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for tensor in (made, copied):
        assert not tensor.requires_grad and not tensor.is_inference()
        (tensor * weight).sum().backward()
