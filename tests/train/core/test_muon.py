"""Muon: its update beside PyTorch's and the exact one, sharded matrices, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from mblm.train.core.muon import Muon, orthogonalized
from mblm.train.core.parallel import like_shard, shard_of
from mblm.utils.distributed import process_group

from . import jobs

SHAPES = [(24, 16), (16, 24), (24, 16), (12, 12), (1, 7), (40, 8)]


def matrices(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def train(optimizer, parameters, steps=5):
    for step in range(steps):
        for parameter, gradient in zip(parameters, matrices(seed=step + 1), strict=True):
            gradient = gradient.to(parameter.dtype)
            parameter.grad = like_shard(shard_of(gradient, parameter), parameter)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 16, 24), (12, 12)], ids=str)
def test_singular_values_become_about_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.expand(1, *shape) if x.ndim == 2 else x
    u, before, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalized(x)
    assert before.min() < 1 < before.max()
    values = u.mT @ y @ vh.mT
    assert values.diagonal(dim1=-2, dim2=-1).sub(0.95).abs().max() < 0.3
    torch.testing.assert_close(values - values.diagonal(dim1=-2, dim2=-1).diag_embed(), 0 * values)


@pytest.mark.parametrize("shape", [(2, 12, 16), (2, 8, 40), (2, 40, 8)], ids=str)
@pytest.mark.parametrize("smallest", [1.0, 1e-6])
def test_the_singular_values_are_those_of_the_iteration(shape, smallest):
    """Also where a wide matrix is multiplied by small factors, and in few digits."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values = values * torch.logspace(0, math.log10(smallest), values.shape[-1])
    x = u * values.unsqueeze(-2) @ vh
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(
        orthogonalized(x.float()).double(), u * values.unsqueeze(-2) @ vh, rtol=0, atol=1e-3
    )


def test_small_factors_are_multiplied_only_where_products_have_all_digits(monkeypatch):
    x = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    precise = orthogonalized(x)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(torch, "eye", lambda *_, **__: pytest.fail("by factors"))
    torch.testing.assert_close(orthogonalized(x), precise, atol=1e-3, rtol=0)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


def test_an_update_is_as_large_as_adamws():
    (weight,) = [nn.Parameter(torch.zeros(64, 48))]
    weight.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [weight], "orthogonalize": True}], lr=1.0).step()
    assert 0.15 < weight.square().mean().sqrt() < 0.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_steps_are_those_of_pytorchs_muon_but_for_its_bfloat16():
    ours, theirs = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    train(Muon([{"params": ours, "orthogonalize": True}], **options), ours)
    train(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), theirs)
    for mine, other, first in zip(ours, theirs, matrices(), strict=True):
        assert (mine - other).norm() < 0.02 * (other - first).norm()


def test_the_rest_takes_the_steps_of_adamw():
    ours, theirs = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    train(Muon(ours, **options), ours)
    train(torch.optim.AdamW(theirs, fused=True, **options), theirs)
    assert jobs.same(ours, theirs)


def test_groups_have_rates_of_their_own_and_a_parameter_without_gradient_stays():
    matrix, bias, frozen = (nn.Parameter(torch.ones(shape)) for shape in [(4, 4), (4,), (4, 4)])
    first = {"params": [matrix, frozen], "orthogonalize": True, "lr": 0.1}
    optimizer = Muon([first, {"params": [bias]}], lr=0.0)
    matrix.grad, bias.grad = torch.ones(4, 4), torch.ones(4)
    optimizer.step()
    assert (matrix < 1).all()
    assert torch.equal(bias, torch.ones(4)) and torch.equal(frozen, torch.ones(4, 4))
    assert frozen not in optimizer.state


def test_its_state_is_plain_and_goes_on_to_the_bit(tmp_path):
    def make():
        parameters = [nn.Parameter(m) for m in matrices()]
        groups = [{"params": parameters[:3], "orthogonalize": True}, {"params": parameters[3:]}]
        return parameters, Muon(groups, lr=0.02)

    parameters, optimizer = make()
    train(optimizer, parameters)
    torch.save([optimizer.state_dict(), *(p.detach() for p in parameters)], tmp_path / "state")
    state, *weights = torch.load(tmp_path / "state", weights_only=True)
    others, other = make()
    other.load_state_dict(state)
    for parameter, weight in zip(others, weights, strict=True):
        parameter.data.copy_(weight)
    train(optimizer, parameters)
    train(other, others)
    assert jobs.same(others, parameters)


def groups_of(parameters):
    """The last matrix has a single row, and so no shard on most workers."""
    *matrices, other, row = parameters
    return [{"params": [*matrices, row], "orthogonalize": True}, {"params": [other]}]


def step_as_shards(folder):
    with process_group(backend="gloo") as run_vars:
        holder = nn.ParameterList(nn.Parameter(m) for m in matrices())
        mesh = init_device_mesh("cpu", (run_vars.world_size,))
        fully_shard(holder, mesh=mesh)
        parameters = list(holder.parameters())
        optimizer = Muon(groups_of(parameters), lr=0.02, weight_decay=0.1)
        with CommDebugMode() as exchanged:
            train(optimizer, parameters, steps=3)
        assert exchanged.get_total_counts() == 3 * len(optimizer.param_groups[0]["params"])
        whole = [parameter.full_tensor().detach() for parameter in parameters]
        if run_vars.rank == 0:
            torch.save(whole, folder / "whole.pt")


def test_sharded_parameters_take_the_steps_of_whole_ones_to_the_bit(tmp_path: Path):
    """And a step exchanges something once for each matrix."""
    assert jobs.join(jobs.start(step_as_shards, 3, tmp_path)) == [0] * 3  # of unequal shards
    parameters = [nn.Parameter(m) for m in matrices()]
    train(Muon(groups_of(parameters), lr=0.02, weight_decay=0.1), parameters, steps=3)
    assert jobs.same(torch.load(tmp_path / "whole.pt"), [p.detach() for p in parameters])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"momentum": 1.0}, "momentum: expected at least 0 and less than 1, got 1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


def test_what_is_no_matrix_is_refused():
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"params: expected matrices to orthogonalize, got \(3,\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "orthogonalize": True})
    assert len(optimizer.param_groups) == 1


def test_a_hook_of_a_step_is_called_once_whatever_other_optimizers_there_are():
    parameter = torch.nn.Parameter(torch.ones(3))
    torch.optim.AdamW([parameter])
    optimizer, calls = Muon([parameter]), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert calls == [1] and optimizer.state[parameter]["step"] == 1
