"""CUDA facts: without a device, with a simulated one, and that importing asks for none."""

from types import SimpleNamespace

import pytest
import torch

from mblm.utils import cuda
from mblm.utils.cuda import CudaMemorySnapshot, cuda_memory_snapshot, cuda_properties
from tests import fresh

NOTHING = CudaMemorySnapshot(0.0, 0.0, 0.0, 0.0, 0.0, "GB")


@pytest.fixture
def one_device(monkeypatch):
    """Makes torch report one device."""
    sizes = {
        "memory_allocated": 2**30,
        "max_memory_allocated": 2**31,
        "memory_reserved": 2**29,
        "max_memory_reserved": 2**28 + 2**20,
    }
    device = SimpleNamespace(name="Card", total_memory=8 * 2**30, major=9, minor=0)
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def no_device(monkeypatch):
    """Makes torch report no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def forget(monkeypatch):
    """Lets the module's constants be found out anew, in the test and after it."""
    names = ("IS_CUDA_AVAILABLE", "IS_BF16_AVAILABLE")
    for name in names:
        vars(cuda).pop(name, None)
    yield
    for name in names:
        vars(cuda).pop(name, None)


def test_without_a_device(no_device, forget):
    assert cuda_properties().cuda_devices == []
    assert cuda_properties().cuda_available is False
    for device in (None, 0, "cuda:0", "cpu"):
        assert cuda_memory_snapshot(device) == NOTHING
    assert (cuda.IS_CUDA_AVAILABLE, cuda.IS_BF16_AVAILABLE) == (False, False)


def test_with_a_device(one_device, forget):
    properties = cuda_properties()
    assert properties.cuda_available is True
    assert properties.cuda_version == "13.0"
    assert properties.cuda_devices == [f"Card_{8 * 2**30}_9.0"]
    assert (cuda.IS_CUDA_AVAILABLE, cuda.IS_BF16_AVAILABLE) == (True, True)


@pytest.mark.parametrize("device", [None, 0, "cuda:0", torch.device("cuda", 0)])
def test_memory_of_a_device_in_gigabytes(one_device, device):
    assert cuda_memory_snapshot(device) == CudaMemorySnapshot(1.0, 2.0, 0.5, 0.251, 8.0, "GB")
    assert cuda_memory_snapshot(device, dec_prec=1).reserved_max == 0.3


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_cpu_has_no_cuda_memory(one_device, device):
    assert cuda_memory_snapshot(device) == NOTHING


def test_importing_asks_for_no_device():
    code = (
        "import torch\n"
        "def fail(): raise SystemExit('asked for a device')\n"
        "torch.cuda.is_available = torch.cuda.device_count = fail\n"
        "import mblm.utils.cuda"
    )
    fresh.output_of(code)
