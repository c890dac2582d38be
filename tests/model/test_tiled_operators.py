"""Passes in tiles as operators: equal to those without, and compiled without a break."""

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mblm import MBLM, MBLMEncoder, MBLMReturnType
from mblm.model import tiled_operators
from mblm.model.tiled_pass import parameters_below_global
from tests.models import encoder, mamba, model, transformer

PAD = 18  # of the models below, whose vocabulary is 19
CLOSE = {"atol": 1e-9, "rtol": 1e-7}


def build(**fields: Any) -> MBLM:
    torch.manual_seed(0)
    m = model(transformer(), transformer(pos_emb_type="rope"), seq_lens=[5, 4]).double().train()
    m.config = m.config.model_copy(update={"tile": 4, **fields})
    return m


def draw_ids() -> Tensor:
    return torch.randint(0, PAD, (2, 20))


def gradients(m: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in m.named_parameters()}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """What gets no gradient may get one of zeros."""
    for name, gradient in expected.items():
        other = actual[name]
        if other is None or gradient is None:
            assert gradient is None and (other is None or not other.any()), name
        else:
            torch.testing.assert_close(other, gradient, **CLOSE, msg=lambda x, n=name: f"{n}: {x}")


@pytest.fixture
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of a compiled model, without compiling."""
    monkeypatch.setattr(tiled_operators, "suit", lambda model: True)


@pytest.mark.usefixtures("as_compiled")
class TestOperators:
    def test_loss_and_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        m, ids, mask = build(), draw_ids(), torch.rand(2, 20).double()
        loss = m(ids, loss_mask=mask)
        actual = gradients(m, loss * 3)
        monkeypatch.setattr(tiled_operators, "suit", lambda model: False)
        expected = m(ids, loss_mask=mask)
        torch.testing.assert_close(loss, expected, **CLOSE)
        assert_same(actual, gradients(m, expected * 3))

    def test_without_gradients(self) -> None:
        m, ids = build(), draw_ids()
        with torch.no_grad():
            loss = m(ids)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, m(ids).detach(), **CLOSE)

    @pytest.mark.parametrize("trained", ["nothing", "stage 1", "the logits"])
    def test_frozen_weights(self, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
        m, ids = build().requires_grad_(False), draw_ids()
        if trained != "nothing":
            (m.stage_models[0] if trained == "stage 1" else m.to_logits).requires_grad_()
        loss = m(ids)
        assert loss.requires_grad == (trained != "nothing")
        if trained == "nothing":
            return
        actual = gradients(m, loss)
        monkeypatch.setattr(tiled_operators, "suit", lambda model: False)
        assert_same(actual, gradients(m, m(ids)))

    def test_autocast_reaches_into_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        m, ids = build().float(), draw_ids()
        seen: list[torch.dtype] = []
        for module in (m.to_logits, m.parts_of_patches(0)[2]):
            module.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        losses = []
        for suits in (True, False):
            monkeypatch.setattr(tiled_operators, "suit", lambda model, suits=suits: suits)
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(m(ids))
        assert losses[0].dtype == torch.float32 and set(seen) == {torch.bfloat16}
        torch.testing.assert_close(losses[0], losses[1], atol=1e-2, rtol=1e-2)
        found = gradients(m, losses[0]).values()
        assert all(torch.isfinite(g).all() for g in found if g is not None)

    def test_half_precision(self) -> None:
        m, ids = build().bfloat16(), draw_ids()
        loss = m(ids)
        assert loss.dtype == torch.bfloat16
        assert all(g.dtype == torch.bfloat16 for g in gradients(m, loss).values() if g is not None)


class TestModels:
    """A model is found by its number."""

    def test_a_copy_has_one_of_its_own(self) -> None:
        m = build()
        file = io.BytesIO()
        torch.save(m, file)
        file.seek(0)
        others = [copy.copy(m), copy.deepcopy(m), torch.load(file, weights_only=False)]
        assert len({x.number for x in (m, *others)}) == 4
        assert all(tiled_operators._MODELS[x.number] is x for x in (m, *others))

    def test_is_not_kept_alive(self) -> None:
        m = build()
        number = m.number
        del m
        gc.collect()
        assert number not in tiled_operators._MODELS

    def test_weights_of_another_are_refused(self) -> None:
        m = build()
        others = [p.clone() for p in m.token_embs_rev[-1].parameters()]
        with pytest.raises(RuntimeError, match="weights that are not its own"):
            torch.ops.mblm.global_tokens(draw_ids(), others, m.number, 4, None)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas, fake functions and gradients, as `opcheck` sees them, which passes clones."""
    monkeypatch.setattr(tiled_operators, "_check_weights", lambda own, given: None)
    m, ids = build(), draw_ids()
    below = parameters_below_global(m)
    attended = torch.randn(2, 6, 8).double().requires_grad_()
    torch.library.opcheck(
        torch.ops.mblm.loss_in_tiles.default,
        (attended, ids, ids, None, None, below, m.number, 4, PAD, True, None),
    )
    embedding = [*m.token_embs_rev[-1].parameters()]
    torch.library.opcheck(torch.ops.mblm.global_tokens.default, (ids, embedding, m.number, 4, None))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"checkpoint_global": True}], ids=str)
def test_a_decoder_is_compiled_without_a_break(fields: dict[str, Any]) -> None:
    m = model(mamba("mamba2"), transformer(), transformer(), seq_lens=[5, 3, 4]).double().train()
    m.config = m.config.model_copy(update={"tile": 4, **fields})
    ids = torch.randint(0, PAD, (2, 50))
    expected = gradients(m, m(ids))
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(gradients(m, compiled(ids)), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), m(ids), **CLOSE)


@pytest.mark.slow
def test_an_encoder_is_compiled_without_a_break() -> None:
    m: MBLMEncoder = encoder(seq_lens=[5, 4]).double().train()
    m.config = m.config.model_copy(update={"tile": 4})
    ids = torch.randint(0, PAD - 1, (2, 20))
    given = {
        "attention_mask": torch.arange(20).expand(2, -1) < 13,
        "labels": ids.masked_fill(ids < 3, -100),
        "return_type": MBLMReturnType.LOSS,
    }
    expected = gradients(m, m(ids, **given))
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert_same(gradients(m, compiled(ids, **given)), expected)


@pytest.mark.slow
def test_by_the_default_compiler_under_autocast() -> None:
    m, ids = build().float(), draw_ids()
    compiled = torch.compile(m, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = compiled(ids), m(ids)
    torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-2)
    actual, wanted = gradients(m, loss), gradients(m, expected)
    for name, gradient in wanted.items():
        if gradient is not None and gradient.any():
            error = (actual[name] - gradient).norm() / gradient.norm()
            assert error < 0.05, f"{name}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["offload", "hooks on gradients"])
def test_what_takes_a_break_compiles_with_one(what: str) -> None:
    m, ids = build(offload=what == "offload"), draw_ids()
    expected = gradients(m, m(ids))
    if what == "hooks on gradients":
        m.to_logits.weight.register_hook(lambda gradient: None)
    assert_same(gradients(m, torch.compile(m, backend="aot_eager")(ids)), expected)
