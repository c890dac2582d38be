"""Long sequences in tiles: the losses, gradients and outputs of a pass without, and its memory."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mblm import MBLM, MBLMEncoder, MBLMReturnType
from mblm.model.block import StageBlock
from mblm.model.tiled_pass import INFERENCE_TILE
from tests.model.golden import (
    DECODERS,
    ENCODERS,
    FORWARD,
    GRADIENT,
    WITH_GRADIENTS,
    golden_case,
)
from tests.models import LSTMBlock, encoder, hierarchies, mamba, model, transformer
from tests.ops.largest_tensor import LargestTensor

LOSS, LOGITS = MBLMReturnType.LOSS, MBLMReturnType.LOGITS
LOSS_LOGITS, HIDDEN = MBLMReturnType.LOSS_LOGITS, MBLMReturnType.HIDDEN_STATE
CLOSE = {"atol": 1e-9, "rtol": 1e-7}  # in float64, where cancellation is of constants' rounding
PAD = 18  # of the models below, whose vocabulary is 19
Model = MBLM | MBLMEncoder


def tiled(m: Model, tile: int | None = 4, **fields: Any) -> Any:
    """A copy of a model that computes in tiles."""
    m = copy.deepcopy(m)
    m.config = m.config.model_copy(update={"tile": tile, **fields})
    return m


def draw_ids(*shape: int) -> Tensor:
    return torch.randint(0, PAD, shape)


def gradients(m: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in m.named_parameters()}


def assert_same_gradients(
    m: nn.Module, other: nn.Module, losses: list[Tensor], **close: float
) -> None:
    expected, actual = gradients(m, losses[0]), gradients(other, losses[1])
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        torch.testing.assert_close(
            actual[name], gradient, **(close or CLOSE), msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def three() -> MBLM:
    m = model(mamba("mamba1"), transformer(), transformer(), seq_lens=[5, 3, 4], num_layers=[2] * 3)
    return m.double().train()


@given(m=hierarchies(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_loss_and_gradients_are_those_without_tiles(m: MBLM, data: st.DataObject) -> None:
    """1 to 4 stages of mixed blocks, ragged lengths, padding, weights, any tile."""
    m = m.double().train()
    length = data.draw(st.integers(1, m.context_size), label="length")
    batch_size = data.draw(st.integers(1, 3), label="batch")
    other = tiled(
        m,
        data.draw(st.integers(1, 20), label="tile"),
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


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_custom_stages_segments_of_one_position_are_offloaded(length: int) -> None:
    m = model(LSTMBlock(with_hook=True), seq_lens=[6]).double().train()
    other = tiled(m, 1, checkpoint_global=True, offload=True)
    ids = draw_ids(2, length)
    assert_same_gradients(m, other, [x(ids) for x in (m, other)])


@given(m=hierarchies(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_outputs_are_those_without_tiles(m: MBLM, data: st.DataObject) -> None:
    m = m.double()
    other = tiled(m, data.draw(st.integers(1, 20), label="tile"))
    ids = torch.randint(0, 19, (2, data.draw(st.integers(1, m.context_size), label="length")))
    nested = torch.randint(0, 19, (2, *m.seq_lens))
    for x in (ids, nested):
        for kind in (LOGITS, HIDDEN, LOSS_LOGITS):
            for with_gradients in (True, False):
                with torch.set_grad_enabled(with_gradients):
                    expected, actual = (net(x, return_type=kind) for net in (m, other))
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


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("tile", [5, 32])
def test_golden_cases(name: str, tile: int) -> None:
    case = golden_case(name)
    m = tiled(case.model(), tile)
    for length in case.lengths:
        expected = case.group(f"len{length}")
        loss, logits = m(expected["ids"], return_type=LOSS_LOGITS)
        torch.testing.assert_close(logits, expected["logits"], **FORWARD)
        torch.testing.assert_close(loss, expected["loss"][0], **FORWARD)
        torch.testing.assert_close(m(expected["ids"]), expected["loss"][0], **FORWARD)
    masked = case.group("masked")
    loss = m(masked["ids"], loss_mask=masked["mask"])
    torch.testing.assert_close(loss, masked["loss"][0], **FORWARD)


@pytest.mark.parametrize("name", [name for name in DECODERS if name in WITH_GRADIENTS])
def test_golden_gradients(name: str) -> None:
    case = golden_case(name)
    expected = case.group("grad")
    if not expected:
        pytest.skip("this copy of the case holds no gradients; the larger set does")
    m = tiled(case.model(), 16, checkpoint_global=True).train()
    actual = gradients(m, m(case.group(f"len{case.lengths[-1]}")["ids"]))
    for key, gradient in expected.items():
        error = (actual[key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error < GRADIENT, f"{key}: {error:.1e} of the largest entry"


class TestEncoder:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_golden_cases(self, name: str) -> None:
        case = golden_case(name)
        m = tiled(case.model(), 3)
        for length in case.lengths:
            expected = case.group(f"len{length}")
            arguments = {
                "input_ids": expected["ids"],
                "attention_mask": expected["attention_mask"],
                "labels": expected["labels"],
            }
            loss, logits = m(**arguments, return_type=LOSS_LOGITS)
            torch.testing.assert_close(loss, expected["loss"][0], **FORWARD)
            torch.testing.assert_close(logits, expected["logits"], **FORWARD)
            torch.testing.assert_close(m(**arguments, return_type=LOSS), loss, **FORWARD)
            hidden = m(**arguments, return_type=HIDDEN)
            torch.testing.assert_close(hidden, expected["hidden"], **FORWARD)

    @pytest.mark.parametrize("tile", [1, 4, 9])
    @pytest.mark.parametrize("seq_lens", [[20], [5, 4], [4, 2, 3]], ids=str)
    def test_loss_and_gradients(self, seq_lens: list[int], tile: int) -> None:
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

    @pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.bfloat16, torch.float32])
    def test_takes_masks_of_any_dtype(self, three: MBLM, dtype: torch.dtype) -> None:
        ids, mask = draw_ids(2, 50), torch.randint(0, 2, (2, 50)).to(dtype)
        expected = three(ids, loss_mask=mask)
        torch.testing.assert_close(tiled(three)(ids, loss_mask=mask), expected, **CLOSE)

    def test_sum_and_count(self, three: MBLM) -> None:
        ids, mask = draw_ids(2, 50), torch.randint(0, 2, (2, 50))
        for m in (three, tiled(three)):
            total, count = m.loss_sum(ids, mask)
            assert count == mask.count_nonzero()
            torch.testing.assert_close(total / count, three(ids, loss_mask=mask), **CLOSE)
        with pytest.raises(ValueError, match="at least one byte"):
            three.loss_sum(ids[:, :0])
        with pytest.raises(ValueError, match="loss_mask: expected the shape"):
            three.loss_sum(ids, mask[:1])

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


# -- Memory ---------------------------------------------------------------------------------------


class Saved:
    """A tensor that is saved for a backward pass, for as long as it is."""

    alive: ClassVar["weakref.WeakSet[Saved]"] = weakref.WeakSet()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.alive.add(self)

    @classmethod
    def entries(cls) -> int:
        """Entries of what is saved now, parameters not counted, nothing counted twice."""
        storages = {
            saved.tensor.untyped_storage().data_ptr(): saved.tensor
            for saved in cls.alive
            if not isinstance(saved.tensor, nn.Parameter)
        }
        return sum(t.untyped_storage().nbytes() // t.element_size() for t in storages.values())


def entries_saved_by(function: Callable[[], Any]) -> tuple[int, Any]:
    """Entries that wait for a backward pass after a call, and what it returns."""
    gc.collect()
    Saved.alive.clear()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        out = function()
    gc.collect()
    return Saved.entries(), out


class TestMemory:
    """Beside the ids, only the most global stage's positions grow with the sequence."""

    DIM, PATCH = 8, 16 * 4

    @pytest.fixture
    def long(self) -> MBLM:
        block = transformer(pos_emb_type="rope")
        m = model(mamba("mamba2"), block, block, seq_lens=[64, 16, 4], num_layers=[1, 2, 2])
        return m.train()

    @pytest.mark.parametrize("kind", [LOSS, LOSS_LOGITS, HIDDEN])
    def test_what_is_saved(self, long: MBLM, kind: MBLMReturnType) -> None:
        length = 64 * self.PATCH
        ids = draw_ids(1, length)
        whole, _ = entries_saved_by(lambda: long(ids, return_type=kind))
        entries, out = entries_saved_by(lambda: tiled(long, 64)(ids, return_type=kind))
        output = {LOSS: 0, HIDDEN: self.DIM, LOSS_LOGITS: 19}[kind] * length
        assert whole > 20 * length * self.DIM, "all activations of the local stage"
        assert entries < 64 * 100 * self.DIM + output + 3 * length, "stage 1's, and the ids"
        assert out is not None

    @pytest.mark.parametrize("num_stages", [2, 3])
    def test_no_tensor_is_as_long_as_the_sequence(self, num_stages: int) -> None:
        """Not in the forward pass and not in the backward pass: what they make is counted."""
        seq_lens = [64, 32] if num_stages == 2 else [16, 16, 8]
        m = model(
            mamba("mamba2"),
            *[transformer(pos_emb_type="rope")] * (num_stages - 1),
            seq_lens=seq_lens,
        )
        m = tiled(m, 32, checkpoint_global=True).train()
        weights = max(p.numel() for p in m.parameters())
        ids = draw_ids(1, m.context_size)
        with LargestTensor() as largest:
            m(ids).backward()
        # 16 bytes' embeddings for each position of a tile, in the most global stage's embedding.
        assert largest.entries <= max(2 * len(ids[0]), weights, 16 * 32 * self.DIM, 64 * 8 * 32)
        assert largest.entries < len(ids[0]) * self.DIM

    def test_tiles_nest(self, long: MBLM) -> None:
        """A patch of the most global stage may hold many tiles."""
        m = tiled(long, 4)
        with LargestTensor() as largest:
            m(draw_ids(1, self.PATCH)).backward()
        weights = max(p.numel() for p in m.parameters())
        assert largest.entries <= max(weights, 17 * 2 * self.DIM)

    @pytest.mark.parametrize("kind", [LOSS, LOGITS, HIDDEN, LOSS_LOGITS])
    def test_inference_makes_no_more_than_its_output_and_a_tile(self, kind: MBLMReturnType) -> None:
        m = model(mamba("mamba2"), transformer(pos_emb_type="rope"), seq_lens=[64, 64])
        ids = draw_ids(8, 64 * 64)
        per_byte = {LOSS: 1, HIDDEN: self.DIM}.get(kind, 19)
        with LargestTensor() as largest, torch.no_grad():
            m(ids, return_type=kind)
        tile = INFERENCE_TILE * 65 // 64 * 2 * 2 * self.DIM  # the feed-forward's width
        assert largest.entries <= max(ids.numel() * per_byte, tile)
        assert m.config.tile is None

    @pytest.mark.parametrize(
        "block",
        [transformer(), mamba("mamba1"), mamba("mamba2"), LSTMBlock(with_hook=True)],
        ids=lambda block: block.block_type,
    )
    def test_a_recomputed_global_stage_keeps_its_inputs(self, block: StageBlock) -> None:
        m = model(block, transformer(), seq_lens=[64, 4], num_layers=[3, 1]).train()
        ids = draw_ids(1, 256)
        kept, less = (
            entries_saved_by(functools.partial(tiled(m, 16, checkpoint_global=recompute), ids))[0]
            for recompute in (False, True)
        )
        assert less < kept / 2

    def test_offloaded_activations_are_copies_in_host_memory(self, three: MBLM) -> None:
        """Which are then on no GPU; weights are not copied."""
        other = tiled(three, offload=True)
        ids = draw_ids(2, 50)
        assert_same_gradients(three, other, [three(ids), other(ids)], rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Tiles, recomputation and the host's memory: the gradients of a plain pass, in less memory."""
    torch.manual_seed(0)
    upper = mamba("mamba2", d_state=16, headdim=16)
    local = transformer(attn_head_dims=16, attn_num_heads=4)
    plain = model(
        upper, local, local, seq_lens=[64, 16, 8], hidden_dims=[64] * 3, num_layers=[2] * 3
    )
    plain = plain.cuda().train()
    ids = draw_ids(1, 64 * 128).cuda()
    wanted = gradients(plain, plain(ids))
    peaks = {}
    for name, fields in {
        "whole": {},
        "tiles": {"tile": 256},
        "all": {"tile": 256, "checkpoint_global": True, "offload": True},
    }.items():
        m = tiled(plain, **{"tile": None, **fields})
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = m(ids)
        actual = gradients(m, loss)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        for key, gradient in wanted.items():
            if gradient is not None and gradient.any():
                error = (actual[key] - gradient).norm() / gradient.norm()
                assert error < (1e-3 if dtype == torch.float32 else 0.1), f"{name}, {key}: {error}"
    assert peaks["tiles"] < 0.3 * peaks["whole"] and peaks["all"] <= peaks["tiles"]


def test_without_a_tile_a_training_step_is_what_it_was(three: MBLM) -> None:
    ids = draw_ids(1, 60)
    assert three.tile_for(10**9) is None
    assert tiled(three, 60).tile_for(60) is None and tiled(three, 59).tile_for(60) == 59
    with torch.no_grad():
        assert three.tile_for(INFERENCE_TILE) is None
        assert three.tile_for(INFERENCE_TILE + 1) == INFERENCE_TILE
    assert torch.equal(tiled(three, 60)(ids), three(ids))
