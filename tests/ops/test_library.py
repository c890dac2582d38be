"""What holds for every operator's registration."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mblm.ops import _library


def test_a_reference_on_cuda_tensors_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MBLM_NATIVE", raising=False)
    run = _library._said_on_cuda("double", lambda x: x * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(torch.ones(1)).item() == 2
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        with pytest.warns(RuntimeWarning, match="mblm::double runs in plain PyTorch on the GPU"):
            run(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(x)


def test_it_is_not_said_to_who_turned_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBLM_NATIVE", "0")
    run = _library._said_on_cuda("double", lambda x: x * 2)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(torch.empty(1, device="cuda"))
