"""Long sequences in tiles: the losses, gradients and outputs of a pass without."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mblm import MBLM, MBLMReturnType
from mblm.model.block import StageBlock
from mblm.model.tiles import INFERENCE_TILE
from tests.hierarchies import hierarchies
from tests.model.tiled import (
    CLOSE,
    HIDDEN,
    LOGITS,
    LOSS,
    LOSS_LOGITS,
    PAD,
    assert_same_gradients,
    draw_ids,
    gradients,
    tiled,
)
from tests.models import encoder, mamba, model, transformer


@pytest.fixture
def three() -> MBLM:
    layers = [2, 1, 1]
    m = model(mamba("mamba1"), transformer(), transformer(), seq_lens=[5, 3, 4], num_layers=layers)
    return m.double().train()


def draw_tile(data: st.DataObject, length: int) -> int:
    """At least 1, and at most some 20 tiles: each costs as much as the whole pass without."""
    return data.draw(st.integers(-(-length // 20), 20), label="tile")


@given(m=hierarchies(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_loss_and_gradients_are_those_without_tiles(m: MBLM, data: st.DataObject) -> None:
    """1 to 4 stages of mixed blocks, ragged lengths, padding, weights, any tile."""
    m = m.double().train()
    length = data.draw(st.integers(1, min(m.context_size, 64)), label="length")
    batch_size = data.draw(st.integers(1, 3), label="batch")
    other = tiled(
        m,
        draw_tile(data, batch_size * length),
        checkpoint_global=data.draw(st.booleans(), label="checkpoint_global"),
        offload=data.draw(st.booleans(), label="offload"),
    )
    ids = torch.randint(0, 19, (batch_size, length))  # 18 is the padding
    mask = None
    if data.draw(st.booleans(), label="weighted"):
        mask = torch.randint(0, 3, ids.shape).double()
    losses = [x(ids, loss_mask=mask) for x in (m, other)]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    assert_same_gradients(m, other, losses)


@given(m=hierarchies(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_outputs_are_those_without_tiles(m: MBLM, data: st.DataObject) -> None:
    m = m.double()
    length = data.draw(st.integers(1, min(m.context_size, 64)), label="length")
    other = tiled(m, draw_tile(data, 2 * length))
    patches = data.draw(st.integers(1, m.seq_lens[0]), label="patches")
    kind = data.draw(st.sampled_from([LOGITS, HIDDEN, LOSS_LOGITS]), label="kind")
    for shape in ((2, length), (1, patches, *m.seq_lens[1:])):
        ids = torch.randint(0, 19, shape)
        with torch.set_grad_enabled(data.draw(st.booleans(), label="with gradients")):
            expected, actual = (net(ids, return_type=kind) for net in (m, other))
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kind", [LOGITS, HIDDEN, LOSS_LOGITS])
def test_gradients_of_outputs(three: MBLM, kind: MBLMReturnType) -> None:
    other = tiled(three)
    ids, mask = draw_ids(2, 50), torch.rand(2, 50).double()
    sums = []
    for m in (three, other):
        out = m(ids, return_type=kind, loss_mask=mask)
        sums.append(out[0] + out[1].square().mean() if kind == LOSS_LOGITS else out.square().sum())
    assert_same_gradients(three, other, sums)


@pytest.mark.parametrize("tile", [1, 4, 9])
@pytest.mark.parametrize("seq_lens", [[20], [5, 4], [4, 2, 3]], ids=str)
def test_loss_and_gradients_of_an_encoder(seq_lens: list[int], tile: int) -> None:
    m = encoder(seq_lens=seq_lens).double().train()
    other = tiled(m, tile, checkpoint_global=True)
    ids = draw_ids(2, 19)
    losses = [
        x(
            input_ids=ids,
            attention_mask=torch.arange(19).expand(2, -1) < 13,
            labels=ids.masked_fill(ids < 3, -100),
            loss_mask=(ids % 3).double(),
            return_type=LOSS,
        )
        for x in (m, other)
    ]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    assert_same_gradients(m, other, losses)


class TestLoss:
    @pytest.mark.parametrize("why", ["pad tokens only", "a mask of zeros"])
    def test_of_nothing_is_zero_and_has_a_gradient(self, three: MBLM, why: str) -> None:
        other = tiled(three)
        ids = torch.full((2, 50), PAD) if why == "pad tokens only" else draw_ids(2, 50)
        loss = other(ids, loss_mask=None if why == "pad tokens only" else torch.zeros(2, 50))
        assert loss.item() == 0 and loss.requires_grad
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())

    def test_frozen_stages_get_no_gradient_and_pass_one_on(self, three: MBLM) -> None:
        three.stage_models[2].requires_grad_(False)
        three.to_logits.requires_grad_(False)
        other = tiled(three)
        ids = draw_ids(2, 50)
        assert_same_gradients(three, other, [three(ids), other(ids)])

    def test_only_the_most_global_stage_trained(self, three: MBLM) -> None:
        three.requires_grad_(False)
        three.stage_models[0].requires_grad_()
        other = tiled(three)
        ids = draw_ids(2, 50)
        assert_same_gradients(three, other, [three(ids), other(ids)])

    def test_with_checkpoint_chunks(self, three: MBLM) -> None:
        other = tiled(three)
        other.checkpoint_chunks = [None, 2, 3]
        ids = draw_ids(2, 50)
        assert_same_gradients(three, other, [three(ids), other(ids)])

    def test_gradients_accumulate(self, three: MBLM) -> None:
        other = tiled(three)
        for m in (three, other):
            for seed in range(2):
                torch.manual_seed(seed)
                (m(draw_ids(2, 50)) / 2).backward()
        for (name, p), q in zip(three.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, **CLOSE, msg=lambda x, n=name: n + x)

    def test_gradients_with_hooks_reach_them_once(self, three: MBLM) -> None:
        seen: list[Tensor] = []
        other = tiled(three)
        other.to_logits.weight.register_hook(seen.append)
        ids = draw_ids(2, 50)
        assert_same_gradients(three, other, [three(ids), other(ids)])
        assert len(seen) == 1

    def test_dropout_follows_the_seed(self) -> None:
        dropping = transformer(attn_dropout=0.3, ff_dropout=0.3)
        m = tiled(model(dropping, seq_lens=[5, 3, 4]), checkpoint_global=True).train()
        ids = draw_ids(2, 50)
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            loss = m(ids)
            results.append((loss, gradients(m, loss)["stage_models.0.layers.0.1.1.weight"]))
        assert torch.equal(results[0][0], results[1][0]) and results[0][0] != results[2][0]
        assert torch.equal(results[0][1], results[1][1])

    def test_a_stage_with_an_unregistered_weight_is_refused(self) -> None:
        m = tiled(model(transformer(), HidingBlock(), seq_lens=[5, 4]))
        with pytest.raises(ValueError, match=r"tensor \(8,\) .* none of the model's parameters"):
            m(draw_ids(1, 20))


class HidingBlock(StageBlock):
    block_type: str = "hiding"

    def to_model(self, model_dim: int, num_layers: int) -> nn.Module:
        stage = nn.Linear(model_dim, model_dim)
        scale = [torch.ones(model_dim, requires_grad=True)]
        stage.forward = lambda x: x * scale[0]
        return stage


class TestPrecision:
    @pytest.mark.parametrize("how", ["autocast", "bfloat16"])
    def test_half_precision_is_as_close_as_without_tiles(self, three: MBLM, how: str) -> None:
        exact, ids = three.float(), draw_ids(2, 60)
        expected = gradients(exact, exact(ids))
        errors = {}
        for name, m in (("whole", copy.deepcopy(exact)), ("tiled", tiled(exact, 8))):
            m = m.bfloat16() if how == "bfloat16" else m
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = m(ids)
            assert loss.dtype == (torch.bfloat16 if how == "bfloat16" else torch.float32)
            errors[name] = [
                (actual.float() - expected[key]).norm() / expected[key].norm()
                for key, actual in gradients(m, loss).items()
            ]
        assert sum(errors["tiled"]) < 1.25 * sum(errors["whole"])

    def test_a_scaled_loss(self, three: MBLM) -> None:
        """As a gradient scaler scales it."""
        other = tiled(three)
        ids = draw_ids(2, 50)
        assert_same_gradients(
            three, other, [three(ids) * 2.0**16, other(ids) * 2.0**16], rtol=1e-6, atol=1e-4
        )


@pytest.mark.parametrize("fields", [{"tile": 4}, {"checkpoint_global": True}], ids=str)
@pytest.mark.parametrize("block", [transformer(), mamba("mamba2")], ids=["transformer", "mamba2"])
def test_a_model_may_be_checkpointed_as_a_whole(block: StageBlock, fields: dict[str, Any]) -> None:
    """By its user, who lets PyTorch compute it again in the backward pass."""
    m = model(block, transformer(), seq_lens=[5, 4], num_layers=[2, 1]).double().train()
    other = tiled(m, **{"tile": None, **fields})
    ids = draw_ids(2, 17)
    losses = [m(ids), checkpoint(other, ids, use_reentrant=False)]
    assert_same_gradients(m, other, losses)


def test_without_a_tile_a_training_step_is_what_it_was(three: MBLM) -> None:
    ids = draw_ids(1, 60)
    assert three.tile_for(10**9) is None
    assert tiled(three, 60).tile_for(60) is None and tiled(three, 59).tile_for(60) == 59
    with torch.no_grad():
        assert three.tile_for(INFERENCE_TILE) is None
        assert three.tile_for(INFERENCE_TILE + 1) == INFERENCE_TILE
    assert torch.equal(tiled(three, 60)(ids), three(ids))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_compiled_model_leaves_its_tiles_to_python(three: MBLM, kind: str) -> None:
    """A graph break; stages that are compiled by themselves stay so."""
    m: Any = tiled(three if kind == "decoder" else encoder(seq_lens=[5, 4]).double().train())
    ids = draw_ids(2, 20)
    given = {} if kind == "decoder" else {"labels": ids, "return_type": LOSS}
    expected = m(ids, **given)
    of_weights = gradients(m, expected)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(m, fullgraph=True, backend="aot_eager")(ids, **given)
    compiled = torch.compile(m, backend="aot_eager")
    for _ in range(2):
        loss = compiled(ids, **given)
        torch.testing.assert_close(loss, expected, **CLOSE)
        torch.testing.assert_close(gradients(m, loss), of_weights, **CLOSE)
    calls = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal calls
        calls += 1
        return graph

    m.stage_models[-1].compile(backend=count)
    torch.testing.assert_close(compiled(ids, **given), expected, **CLOSE)
    assert calls
