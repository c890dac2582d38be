"""Whole models under ``torch.func``, forward-mode AD and second derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from mblm import MBLMReturnType
from tests.models import encoder, mamba, model, transformer

LOSS, HIDDEN = MBLMReturnType.LOSS, MBLMReturnType.HIDDEN_STATE
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's

MAKERS: dict[str, Callable[[], Any]] = {
    "transformers": lambda: model(transformer(), seq_lens=[3, 4]),
    "more than 64 positions": lambda: model(transformer(pos_emb_type="rope"), seq_lens=[66, 2]),
    "mamba1": lambda: model(mamba("mamba1"), transformer(), seq_lens=[3, 4]),
    "mamba2": lambda: model(mamba("mamba2"), mamba("mamba2"), seq_lens=[3, 4]),
    "encoder": lambda: encoder(seq_lens=[3, 4]),
    "encoder of more than 64 positions": lambda: encoder(seq_lens=[66, 2]),
}


@pytest.fixture(params=MAKERS)
def m(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]().double()


def draw_ids(m: Any) -> Tensor:
    return torch.randint(0, 17, (2, m.context_size))


def loss_of(m: Any, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    labels = {"labels": ids} if hasattr(m, "mask_token_id") else {}
    out: Tensor = functional_call(m, weights, (ids,), {**labels, "return_type": LOSS})
    return out


def weights_of(m: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in m.named_parameters()}


def gradients(m: Any, ids: Tensor) -> dict[str, Tensor]:
    """By an ordinary backward pass."""
    parameters = dict(m.named_parameters())
    loss = loss_of(m, parameters, ids)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(parameters.items(), found, strict=True)
    }


def test_gradients_of_torch_func(m: Any) -> None:
    ids = draw_ids(m)
    actual = torch.func.grad(functools.partial(loss_of, m))(weights_of(m), ids)
    torch.testing.assert_close(actual, gradients(m, ids))


@pytest.mark.parametrize("how", ["torch.func.jvp", "dual tensors"])
def test_forward_mode(m: Any, how: str) -> None:
    ids, weights = draw_ids(m), weights_of(m)
    expected = gradients(m, ids)
    # Padding has no gradient, but where it is embedded, tangents are its own.
    along = {name: torch.randn_like(w) * (expected[name] != 0) for name, w in weights.items()}
    if how == "torch.func.jvp":
        loss, slope = torch.func.jvp(lambda w: loss_of(m, w, ids), (weights,), (along,))
    else:
        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(w, along[name]) for name, w in weights.items()}
            loss, slope = forward_ad.unpack_dual(loss_of(m, duals, ids))
    torch.testing.assert_close(loss, loss_of(m, weights, ids))
    by_gradients = sum((expected[name] * along[name]).sum() for name in weights)
    torch.testing.assert_close(slope, by_gradients)


def test_gradients_of_every_text(m: Any) -> None:
    ids = draw_ids(m)
    per_text = torch.vmap(torch.func.grad(functools.partial(loss_of, m)), (None, 0))
    actual = per_text(weights_of(m), ids[:, None])
    for index in range(2):
        one = {name: grad[index] for name, grad in actual.items()}
        torch.testing.assert_close(one, gradients(m, ids[index : index + 1]))


@pytest.mark.parametrize("kind", ["transformers", "mamba1", "mamba2"])
def test_a_penalty_on_gradients_has_gradients(kind: str) -> None:
    """Of the embeddings' gradients, as WGAN-GP takes it, against finite differences."""
    m = MAKERS[kind]().double()
    shapes = [(2, *m.seq_lens[:depth], 8) for depth in (2, 1)]
    embeds = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def penalty() -> Tensor:
        hidden = m(inputs_embeds=embeds, return_type=HIDDEN)
        found = torch.autograd.grad(hidden.sin().sum(), embeds, create_graph=True)
        return torch.stack([grad.square().sum() for grad in found]).sum()

    inputs = [*embeds, *m.stage_models.parameters()]
    found = torch.autograd.grad(penalty(), inputs, allow_unused=True)
    ends = []
    along = [torch.randn_like(t) for t in inputs]
    slope = sum((g * d).sum().item() for g, d in zip(found, along, strict=True) if g is not None)
    for sign in (1, -2):
        for tensor, direction in zip(inputs, along, strict=True):
            tensor.data.add_(direction, alpha=sign * 1e-6)
        ends.append(penalty().item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


# What keeps the memory of long contexts small.
PIECEWISE: dict[str, dict[str, Any]] = {
    "whole": {},
    "tile": {"tile": 4},
    "checkpoint_global": {"checkpoint_global": True},
    "offload": {"offload": True},
    "train_checkpoint_chunks": {"train_checkpoint_chunks": [2]},
}


def piecewise(how: str, block: str) -> Any:
    blocks = [mamba("mamba1"), transformer()] if block == "mamba1" else [transformer()] * 2
    m = model(*blocks, seq_lens=[6, 4], **PIECEWISE[how])
    return m.double().train()


@pytest.mark.parametrize("block", ["transformer", "mamba1"])
@pytest.mark.parametrize("how", [*PIECEWISE][1:])
class TestPiecewise:
    def test_transforms_are_of_the_whole(self, how: str, block: str) -> None:
        m = piecewise(how, block)
        ids, weights = draw_ids(m), weights_of(m)
        expected = gradients(m, ids)
        actual = torch.func.grad(functools.partial(loss_of, m))(weights, ids)
        torch.testing.assert_close(actual, expected)
        along = {name: grad.sign() for name, grad in expected.items()}
        _, slope = torch.func.jvp(lambda w: loss_of(m, w, ids), (weights,), (along,))
        torch.testing.assert_close(slope, sum(grad.abs().sum() for grad in expected.values()))

    def test_second_derivatives_are_right_or_refused(self, how: str, block: str) -> None:
        m = piecewise(how, block)
        whole = piecewise("whole", block)
        whole.load_state_dict(m.state_dict())
        ids = draw_ids(m)

        def second(m: Any) -> list[Tensor]:
            loss = loss_of(m, dict(m.named_parameters()), ids)
            parameters = list(m.stage_models.parameters())
            found = torch.autograd.grad(loss, parameters, create_graph=True)
            penalty = torch.stack([grad.square().sum() for grad in found]).sum()
            return list(torch.autograd.grad(penalty, parameters))

        if how in ("tile", "checkpoint_global"):
            with pytest.raises(NotImplementedError, match="set tile to None and checkpoint_global"):
                second(m)
        else:
            torch.testing.assert_close(second(m), second(whole))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_decoding_is_refused(transform: Callable[..., Any]) -> None:
    m = MAKERS["transformers"]()
    session = m.session()
    calls: dict[str, Callable[[], Any]] = {
        "MBLM.generate": lambda: m.generate(num_tokens_to_generate=1, enable_progress=False),
        "Session.__init__": m.session,
        "Session.feed": lambda: session.feed(b"\1"),
        "Session.logits": session.logits,
        "Session.generate": lambda: session.generate(1),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{name}: no decoding within torch.func"):
            transform(lambda x, call=call: call() * x.sum())(torch.ones(2))
    assert session.length == 0
