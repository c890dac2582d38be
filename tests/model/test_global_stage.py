"""The most global stage recomputed piece by piece, and activations kept in the host's memory."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mblm import TransformerEncoderBlock
from mblm.model.block import StageBlock
from mblm.model.global_stage import run_recomputed, saved_on_host
from tests.models import LSTMBlock, mamba, transformer

BLOCKS: dict[str, StageBlock] = {
    "transformer": transformer(),
    "transformer, dropout": transformer(ff_dropout=0.5, attn_dropout=0.5),
    "encoder": TransformerEncoderBlock(**transformer().model_dump(exclude={"block_type"})),
    "mamba1": mamba("mamba1"),
    "mamba2": mamba("mamba2"),
    "lstm": LSTMBlock(),
    "lstm with hook": LSTMBlock(with_hook=True),
}


def stage_and_input(name: str) -> tuple[Any, Tensor]:
    stage = BLOCKS[name].to_model(8, 2).double().train()
    return stage, torch.randn(2, 11, 8).double().requires_grad_()


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("segment", [1, 4, 5, 11, 100])
@pytest.mark.parametrize("name", BLOCKS)
def test_recomputed_is_the_same(name: str, segment: int, offload: bool) -> None:
    """With 5, the last segment is of one position."""
    stage, x = stage_and_input(name)
    inputs = (torch.arange(11).expand(2, 11) < 7,) if name == "encoder" else ()
    weights = torch.randn(2, 11, 8).double()
    results = []
    for run in (stage, lambda *xs: run_recomputed(stage, *xs, segment=segment)):
        torch.manual_seed(1)
        with saved_on_host() if offload else contextlib.nullcontext():
            out = run(x, *inputs)
        results.append((out, torch.autograd.grad((out * weights).sum(), [x, *stage.parameters()])))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_offloaded_is_the_same(name: str) -> None:
    stage, x = stage_and_input(name)
    expected = torch.autograd.grad(stage(x).square().sum(), [x, *stage.parameters()])
    with saved_on_host():
        out = run_recomputed(copy.deepcopy(stage), x, segment=4)
        loss = stage(x).square().sum()
    torch.testing.assert_close(out, stage(x))
    actual = torch.autograd.grad(loss, [x, *stage.parameters()])
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


def test_what_is_offloaded_is_a_copy_and_weights_are_not() -> None:
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4, requires_grad=True)
    with saved_on_host():
        out = (x * 2).matmul(weight)  # keeps x * 2 and the weight
    saved = out.grad_fn._saved_self, out.grad_fn._saved_mat2
    assert saved[1] is weight or saved[1].data_ptr() == weight.data_ptr()
    with torch.no_grad():
        x.zero_()  # what was kept is neither x nor a view of it
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient, saved[0].sum(0)[:, None].expand(4, 4))


def test_what_is_offloaded_goes_to_the_host_whatever_the_default_device_is() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.device("meta"), saved_on_host():
        out = x.exp()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], out)


def test_what_has_no_values_is_left_where_it_is() -> None:
    x = torch.randn(3, 4, device="meta", requires_grad=True)
    with saved_on_host():
        out = x.exp()
    assert torch.autograd.grad(out.sum(), x)[0].is_meta


def test_an_empty_tensor_can_be_kept() -> None:
    x = torch.randn(0, 4, requires_grad=True)
    with saved_on_host():
        out = x.exp()
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["transformer", "mamba2"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_offloaded_from_a_gpu(name: str, recomputed: bool) -> None:
    """The same gradients, and between the passes little of the GPU's memory."""
    stage = BLOCKS[name].to_model(64, 6).cuda().train()
    x = torch.randn(1, 4096, 64, device="cuda", requires_grad=True)
    held, results = [], []
    for offload in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with saved_on_host() if offload else contextlib.nullcontext():
            out = run_recomputed(stage, x, segment=256) if recomputed else stage(x)
            loss = out.square().sum()
        del out
        held.append(torch.cuda.memory_allocated() - before)
        results.append(torch.autograd.grad(loss, [x, *stage.parameters()]))
        del loss
    assert held[1] < 0.5 * held[0]
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
