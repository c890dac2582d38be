"""The most global stage recomputed piece by piece, and activations kept in the host's memory."""

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mblm import TransformerEncoderBlock
from mblm.model.block import StageBlock
from mblm.model.gradients import GradientSums
from mblm.model.recomputation import run_in_segments, run_recomputed, saved_on_host
from tests.models import LSTMBlock, LSTMWithHook, mamba, transformer

BLOCKS: dict[str, StageBlock] = {
    "transformer": transformer(),
    "transformer, dropout": transformer(ff_dropout=0.5, attn_dropout=0.5),
    "encoder": TransformerEncoderBlock(**transformer().model_dump(exclude={"block_type"})),
    "mamba1": mamba("mamba1"),
    "mamba2": mamba("mamba2"),
    "mamba2, dropout": mamba("mamba2", dropout=0.5),
    "lstm": LSTMBlock(),
    "lstm with hook": LSTMBlock(with_hook=True),
    "lstm, recurrent": LSTMBlock(with_hook=True),
}


def stage_and_input(name: str) -> tuple[Any, Tensor]:
    stage = BLOCKS[name].to_model(8, 2).double().train()
    if name.endswith("recurrent"):
        stage.is_recurrent = True  # type: ignore[assignment]
    return stage, torch.randn(2, 11, 8).double().requires_grad_()


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("segment", [1, 4, 5, 11, 100])
@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "mamba2, dropout"])
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


@pytest.fixture(params=["transformer", "mamba1", "mamba2"])
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


@pytest.mark.parametrize("name", ["transformer", "mamba1", "mamba2"])
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
    assert max(alive) <= 1, "an output, and none in the backward pass"


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


def test_nothing_reaches_a_frozen_first_layer() -> None:
    stage = BLOCKS["transformer"].to_model(8, 2)
    stage.layers[0].requires_grad_(False)  # type: ignore[index,union-attr]
    x, own = torch.randn(2, 9, 8), list(stage.layers[1].parameters())  # type: ignore[index,union-attr]
    found = gradients(recomputed(stage, x), *own)
    torch.testing.assert_close(found, gradients(stage(x), *own))


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


@pytest.mark.parametrize("name", ["transformer, dropout", "mamba2, dropout"])
def test_dropout_draws_the_same_again_and_leaves_the_generator_alone(name: str) -> None:
    stage: Any = BLOCKS[name].to_model(8, 2).double().train()
    x = torch.randn(1, 10, 8).double().requires_grad_()
    torch.manual_seed(0)
    out = recomputed(stage, x)
    after = torch.get_rng_state()
    (gradient,) = gradients(out, x)
    assert torch.equal(torch.get_rng_state(), after)

    torch.manual_seed(0)
    if name.startswith("transformer"):
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


class CountingLSTM(LSTMWithHook):
    """Its state is of more than tensors with gradients."""

    is_recurrent = True

    def forward_with_state(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        before = None if state is None else state["lstm"]
        seen = torch.zeros((), dtype=torch.int64) if state is None else state["seen"]
        y, after = self.lstm(x + seen, before)
        state = {"lstm": after, "seen": seen + x.shape[1], "count": int(seen), "none": None}
        return y, state


def test_a_state_may_hold_integers_and_none() -> None:
    stage = CountingLSTM(8, 1)
    x = torch.randn(2, 11, 8, requires_grad=True)
    seen = torch.arange(11)[:, None] // 4 * 4
    expected, actual = stage(x + seen), run_recomputed(stage, x, segment=4)
    torch.testing.assert_close(actual, expected)
    inputs = [x, *stage.parameters()]
    torch.testing.assert_close(gradients(actual, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("without", [(), (1,), (0, 1, 2)], ids=str)
def test_gradients_of_what_a_state_hands_on_and_of_what_lets_none_pass(without: Any) -> None:
    weight, x = nn.Parameter(torch.randn(3)), torch.randn(2, 11, 3, requires_grad=True)

    def run(part: Tensor, state: Any) -> tuple[Tensor, Any]:
        index, first, second = state or (0, torch.ones(2, 3), torch.ones(2, 3))
        with torch.set_grad_enabled(torch.is_grad_enabled() and index not in without):
            y = part * weight + first[:, None]
            return y, (index + 1, second, part[:, -1] * weight)

    outs, state = [], None
    for part in x.split(4, dim=1):
        out, state = run(part, state)
        outs.append(out)
    actual = run_in_segments(run, GradientSums([weight]), x, 4)
    of_out = torch.randn(2, 11, 3)
    found, expected = (
        torch.autograd.grad(out, [x, weight], of_out, allow_unused=True, materialize_grads=True)
        for out in (actual, torch.cat([*outs, 0 * x[:, :0]], dim=1))
    )
    torch.testing.assert_close(found, expected)


def test_a_state_that_may_hide_gradients_is_refused() -> None:
    stage: Any = LSTMBlock(with_hook=True).to_model(8, 1)
    stage.is_recurrent, run = True, stage.forward_with_state
    stage.forward_with_state = lambda x, _: (run(x, None)[0], [object()])
    with pytest.raises(TypeError, match="to be a nest of tensors, numbers and None, got object"):
        run_recomputed(stage, torch.randn(1, 8, 8, requires_grad=True), segment=4)


def test_what_has_no_values_is_not_offloaded() -> None:
    stage = BLOCKS["transformer"].to_model(8, 1).to("meta")
    with saved_on_host():
        out = stage(torch.randn(1, 5, 8, device="meta"))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in stage.parameters())


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
