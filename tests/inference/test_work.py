"""What decoding computes, and the memory that a long prompt takes."""

import sys
import textwrap

import pytest

from tests import fresh

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
