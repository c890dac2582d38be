"""Stages recomputed piece by piece on a CPU; see test_global_stage.py, too."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mblm.model.block import StageBlock
from mblm.model.global_stage import run_recomputed
from tests.models import mamba, transformer

BLOCKS: dict[str, StageBlock] = {
    "transformer": transformer(),
    "mamba1": mamba("mamba1"),
    "mamba2": mamba("mamba2"),
}
DROPPING: dict[str, StageBlock] = {
    "transformer": transformer(ff_dropout=0.5, attn_dropout=0.5),
    "mamba2": mamba("mamba2", dropout=0.5),
}


@pytest.fixture(params=BLOCKS)
def stage(request: pytest.FixtureRequest) -> Any:
    return BLOCKS[request.param].to_model(8, 2).train()


def recomputed(stage: Any, x: Tensor) -> Tensor:
    """In segments of four positions where the stage has a state, else in layers."""
    return run_recomputed(stage, x, segment=4)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), inputs)


def nodes(out: Tensor) -> int:
    """Nodes of a graph, leaves aside."""
    seen: set[Any] = set()
    left: list[Any] = [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_graph_of_a_piece_is_kept(name: str) -> None:
    """Small blocks between large ones that are freed keep malloc from using those again."""
    block = BLOCKS[name]
    few = recomputed(block.to_model(8, 1), torch.randn(1, 8, 8, requires_grad=True))
    many = recomputed(block.to_model(8, 5), torch.randn(1, 21, 8, requires_grad=True))
    assert nodes(many) == nodes(few)


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_only_the_results_of_one_segment_are_alive(name: str) -> None:
    stage: Any = BLOCKS[name].to_model(8, 2)
    results: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    run = stage.forward_with_state

    def watched(x: Tensor, state: Any) -> Any:
        alive.append(sum(result() is not None for result in results))
        out, state = run(x, state)
        results.extend(map(weakref.ref, (out, *(t for pair in state for t in pair))))
        return out, state

    stage.forward_with_state = watched
    x = torch.randn(1, 21, 8, requires_grad=True)
    gradients(recomputed(stage, x), x, *stage.parameters())
    assert len(alive) == 12, "six segments, computed twice"
    assert max(alive) <= 1 + 2 * 2, "an output and the states of two layers"


def test_gradients_of_the_parameters_alone(stage: Any) -> None:
    x = torch.randn(2, 10, 8)
    expected = gradients(stage(x), *stage.parameters())
    actual = gradients(recomputed(stage, x), *stage.parameters())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_gradient_of_the_input_alone(stage: Any) -> None:
    stage.requires_grad_(False)
    x = torch.randn(2, 10, 8, requires_grad=True)
    expected = gradients(stage(x), x)
    torch.testing.assert_close(gradients(recomputed(stage, x), x), expected, atol=1e-5, rtol=1e-4)


def test_a_frozen_parameter_gets_none(stage: Any) -> None:
    frozen = next(stage.parameters()).requires_grad_(False)
    recomputed(stage, torch.randn(2, 10, 8)).sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_a_graph_that_is_kept_gives_its_gradients_again(stage: Any) -> None:
    x = torch.randn(2, 10, 8, requires_grad=True)
    loss = recomputed(stage, x).square().sum()
    inputs = [x, *stage.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), first)


def test_autocast_is_that_of_the_forward_pass(stage: Any) -> None:
    x = torch.randn(2, 10, 8, requires_grad=True)
    results = []
    for run in (stage, lambda x: recomputed(stage, x)):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        results.append((out.float(), *gradients(out.float(), x, *stage.parameters())))
    torch.testing.assert_close(results[1], results[0], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_draws_the_same_again_and_leaves_the_generator_alone(name: str) -> None:
    stage: Any = DROPPING[name].to_model(8, 2).double().train()
    x = torch.randn(1, 10, 8).double().requires_grad_()
    torch.manual_seed(0)
    out = recomputed(stage, x)
    after = torch.get_rng_state()
    (gradient,) = gradients(out, x)
    assert torch.equal(torch.get_rng_state(), after)

    torch.manual_seed(0)
    if name == "transformer":
        expected = stage(x)
    else:
        outs, state = [], None
        for part in x.split(4, dim=1):
            part, state = stage.forward_with_state(part, state)
            outs.append(part)
        expected = torch.cat(outs, dim=1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, gradients(expected, x)[0])


def test_a_hook_on_a_gradient_is_called_once(stage: Any) -> None:
    calls: list[Tensor] = []
    weight = next(stage.parameters())
    weight.register_hook(calls.append)
    x = torch.randn(2, 10, 8)
    recomputed(stage, x).square().sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], weight.grad)
