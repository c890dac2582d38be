"""A stage with a state in recomputed segments: what it gives is in test_global_stage.py."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mblm.model.block import StageBlock
from mblm.model.global_stage import run_recomputed
from mblm.model.segments import run_in_segments
from tests.models import mamba

BLOCKS: dict[str, StageBlock] = {"mamba1": mamba("mamba1"), "mamba2": mamba("mamba2")}


@pytest.fixture(params=BLOCKS)
def stage(request: pytest.FixtureRequest) -> Any:
    return BLOCKS[request.param].to_model(8, 2).train()


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), inputs)


def test_only_the_results_of_one_segment_are_alive(stage: Any) -> None:
    """What is kept of a segment between blocks that are freed keeps malloc from using those."""
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
    gradients(run_in_segments(stage, x, 3), x, *stage.parameters())
    assert len(alive) == 14, "seven segments, computed twice"
    assert max(alive) <= 1 + 2 * 2, "an output and the states of two layers"


def test_gradients_of_the_parameters_alone(stage: Any) -> None:
    x = torch.randn(2, 10, 8)
    expected = gradients(stage(x), *stage.parameters())
    actual = gradients(run_in_segments(stage, x, 4), *stage.parameters())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_gradient_of_the_input_alone(stage: Any) -> None:
    stage.requires_grad_(False)
    x = torch.randn(2, 10, 8, requires_grad=True)
    expected = gradients(stage(x), x)
    torch.testing.assert_close(
        gradients(run_in_segments(stage, x, 4), x), expected, atol=1e-5, rtol=1e-4
    )


def test_a_frozen_parameter_gets_none(stage: Any) -> None:
    frozen = next(stage.parameters()).requires_grad_(False)
    run_in_segments(stage, torch.randn(2, 10, 8), 4).sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)


def test_a_graph_that_is_kept_gives_its_gradients_again(stage: Any) -> None:
    x = torch.randn(2, 10, 8, requires_grad=True)
    loss = run_in_segments(stage, x, 4).square().sum()
    inputs = [x, *stage.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), first)


def test_autocast_is_that_of_the_forward_pass(stage: Any) -> None:
    x = torch.randn(2, 10, 8, requires_grad=True)
    results = []
    for run in (stage, lambda x: run_in_segments(stage, x, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        results.append((out.float(), *gradients(out.float(), x, *stage.parameters())))
    torch.testing.assert_close(results[1], results[0], atol=0.1, rtol=0.05)


def test_dropout_draws_the_same_again_and_leaves_the_generator_alone() -> None:
    stage: Any = mamba("mamba2", dropout=0.5).to_model(8, 2).double().train()
    x = torch.randn(1, 10, 8).double().requires_grad_()
    torch.manual_seed(0)
    out = run_in_segments(stage, x, 4)
    after = torch.get_rng_state()
    (gradient,) = gradients(out, x)
    assert torch.equal(torch.get_rng_state(), after)

    torch.manual_seed(0)
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
    run_recomputed(stage, x, segment=4).square().sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], weight.grad)
