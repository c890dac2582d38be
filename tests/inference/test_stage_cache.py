"""Stage caches: which adapter a stage gets, and that snapshots are independent of what follows."""

from typing import Any

import pytest
import torch
from torch import nn

from mblm.inference.stage_cache import ReplayCache, StageCache, StatefulCache, allocate_cache
from mblm.model.mamba_cache import MambaCache
from mblm.model.transformer_cache import TransformerCache
from tests.models import LSTM, LSTMWithHook, mamba, transformer

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
STAGES: dict[str, Any] = {
    "transformer": lambda: transformer().to_model(8, 2),
    "transformer without rotary": lambda: transformer(attn_use_rot_embs=False).to_model(7, 1),
    "mamba1": lambda: mamba("mamba1").to_model(8, 2),
    "mamba2": lambda: mamba("mamba2").to_model(8, 2),
    "lstm with hook": lambda: LSTMWithHook(8, 2),
    "lstm": lambda: LSTM(8, 2),
}


@pytest.fixture(params=STAGES.values(), ids=STAGES)
def stage(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().eval()


def width(stage: nn.Module) -> int:
    return 7 if isinstance(stage, type(STAGES["transformer"]())) and not stage.rotary_emb else 8


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [11, 1]])
@pytest.mark.parametrize("limit", [12, None])
def test_in_pieces_it_is_the_forward_pass(
    stage: nn.Module, cuts: list[int], limit: int | None
) -> None:
    x = torch.randn(3, 12, width(stage))
    cache = allocate_cache(stage, 3, limit)
    outputs = [
        cache.step(part[:, 0])[:, None] if part.shape[1] == 1 else cache.prefill(part)
        for part in x.split(cuts, dim=1)
    ]
    torch.testing.assert_close(torch.cat(outputs, dim=1), stage(x), **CLOSE)


@torch.inference_mode()
def test_a_snapshot_is_independent_of_what_follows(stage: nn.Module) -> None:
    x = torch.randn(2, 9, width(stage))
    expected = stage(x)
    cache = allocate_cache(stage, 2, None)
    cache.prefill(x[:, :4])
    saved = cache.snapshot()
    for _ in range(3):  # it stays intact when restored, and when the cache goes on
        cache.prefill(torch.randn(2, 70, width(stage)))
        cache.restore(saved)
        torch.testing.assert_close(cache.step(x[:, 4]), expected[:, 4], **CLOSE)
        cache.prefill(torch.randn(2, 3, width(stage)))
        cache.restore(saved)
    torch.testing.assert_close(cache.prefill(x[:, 4:]), expected[:, 4:], **CLOSE)


@torch.inference_mode()
def test_a_snapshot_serves_another_cache(stage: nn.Module) -> None:
    x = torch.randn(2, 9, width(stage))
    first, second = (allocate_cache(stage, 2, None) for _ in range(2))
    first.prefill(x[:, :4])
    second.restore(first.snapshot())
    first.prefill(torch.randn(2, 5, width(stage)))
    torch.testing.assert_close(second.prefill(x[:, 4:]), stage(x)[:, 4:], **CLOSE)


@torch.inference_mode()
def test_it_starts_anew_after_the_snapshot_of_a_start(stage: nn.Module) -> None:
    """As a stage does for every patch."""
    x = torch.randn(2, 9, width(stage))
    cache = allocate_cache(stage, 2, 9)
    start = cache.step(x[:, 0])
    after_start = cache.snapshot()
    for _ in range(2):
        out = cache.prefill(x[:, 1:])
        torch.testing.assert_close(torch.cat((start[:, None], out), dim=1), stage(x), **CLOSE)
        cache.restore(after_start)


class Own(LSTMWithHook):
    """Offers everything; its own cache comes first."""

    def allocate_cache(self, batch_size: int, max_positions: int | None) -> StageCache:
        self.arguments = batch_size, max_positions
        return ReplayCache(self)


def test_what_a_stage_offers_decides() -> None:
    own = Own(4, 1)
    assert type(allocate_cache(own, 3, 17)) is ReplayCache
    assert own.arguments == (3, 17)
    assert type(allocate_cache(LSTMWithHook(4, 1), 1, None)) is StatefulCache
    assert type(allocate_cache(LSTM(4, 1), 1, None)) is ReplayCache
    assert type(allocate_cache(STAGES["transformer"](), 1, None)) is TransformerCache
    assert type(allocate_cache(STAGES["mamba1"](), 1, None)) is MambaCache
