"""Long sequences in tiles: the memory of a pass."""

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mblm import MBLM, MBLMReturnType
from mblm.model.block import StageBlock
from mblm.model.tiles import INFERENCE_TILE
from tests.model.tiled import HIDDEN, LOGITS, LOSS, LOSS_LOGITS, draw_ids, gradients, tiled
from tests.models import LSTMBlock, mamba, model, transformer
from tests.ops.modes import LargestTensor


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
        length = 32 * self.PATCH
        ids = draw_ids(1, length)
        whole, _ = entries_saved_by(lambda: long(ids, return_type=kind))
        entries, out = entries_saved_by(lambda: tiled(long, 64)(ids, return_type=kind))
        output = {LOSS: 0, HIDDEN: self.DIM, LOSS_LOGITS: 19 * 5 // 4}[kind] * length
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
        assert largest.entries <= max(ids.numel() * 65 // 64 * per_byte, tile)
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
    ids = draw_ids(8, 64 * 128).cuda()  # beside whose memory that of cuBLAS counts little
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
