"""What decoding computes, and the memory that a long prompt takes."""

import sys
import textwrap
from typing import Any

import pytest
import torch

from mblm.inference.session import Session
from tests import fresh
from tests.models import LSTMBlock, model


def count_positions(m: torch.nn.Module) -> list[int]:
    """How many positions each stage is run on, from now on."""
    counts = [0] * len(m.stage_models)

    def counting(stage: int, original: Any) -> Any:
        def hook(x: torch.Tensor, state: Any) -> Any:
            counts[stage] += x.shape[1]
            return original(x, state)

        return hook

    for index, stage in enumerate(m.stage_models):
        stage.forward_with_state = counting(index, stage.forward_with_state)
    return counts


def test_every_position_is_computed_once_and_only_when_a_byte_after_it_is_wanted() -> None:
    hook = LSTMBlock(with_hook=True)
    m = model(hook, hook, hook, seq_lens=[4, 3, 2])
    counts = count_positions(m)
    session = Session(m)
    assert counts == [1, 1, 1]  # the start tokens, once for all patches
    ids = torch.randint(0, 18, (1, 24))
    for length in range(1, 25):
        session.feed(ids[:, length - 1 : length]).logits()
        whole_outer, whole_inner = (length - 1) // 6, (length - 1) // 2
        assert counts == [1 + whole_outer, 1 + whole_inner - whole_outer, 1 + length]


def test_a_prefill_runs_the_local_stage_on_the_last_patch_alone() -> None:
    hook = LSTMBlock(with_hook=True)
    m = model(hook, hook, hook, seq_lens=[4, 3, 2])
    counts = count_positions(m)
    Session(m).feed(torch.randint(0, 18, (1, 21)))
    assert counts == [1 + 3, 1 + 1, 1 + 1]  # bytes 0 .. 17 | 18, 19 | 20


PEAK = """
    import resource, sys, torch
    from tests.models import mamba, model, transformer
    m = model(mamba("mamba1"), transformer(), seq_lens=[125_001, 8], hidden_dims=[64, 64],
              num_tokens=257)
    ids = torch.randint(0, 256, (int(sys.argv[1]),), dtype=torch.uint8)
    m.generate(ids, num_tokens_to_generate=1, enable_progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(prompt: int) -> float:
    """Peak memory of a fresh process that takes in a prompt, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return int(fresh.output_of(textwrap.dedent(PEAK), prompt)) * unit / 2**20


@pytest.mark.slow
def test_a_prompt_of_a_million_bytes_takes_the_memory_of_its_ids() -> None:
    """One activation of stage 1 over all patches would be 32 MiB, one of the bytes 256 MiB."""
    ids = 900_000 * 8 / 2**20  # as int64
    growth = peak_mib(1_000_000) - peak_mib(100_000)
    assert growth < 24 + 4 * ids, f"{growth:.0f} MiB more for ten times the bytes"
