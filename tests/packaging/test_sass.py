"""The order of instructions that decoding's kernels are made of, as a GPU runs them.

The assembler may move what a source states in order: what is said there of loads that are under way
while a kernel waits holds only if it holds here.
"""

import itertools
import re
from pathlib import Path

import pytest

from tests.packaging.sass import (
    BARRIER,
    COPY,
    CSRC,
    CUOBJDUMP,
    LOAD,
    NVCC,
    PREFETCH,
    SHARED_STORE,
    SHUFFLE,
    STORE,
    WAIT,
    WHAT_LACKS,
    Kernel,
    kernels_of,
    slow_but_few,
)

CUDA = CSRC / "cuda"
needs_tools = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason=f"lacks {WHAT_LACKS}")
# The sources of a unit of decoding, whose kernels begin before those ahead of them have ended.
DECODING = [path for path in sorted(CUDA.glob("decode_*.cu")) if "graph" not in path.name]


@needs_tools
@pytest.mark.parametrize("source", slow_but_few(DECODING))
def test_nothing_is_written_before_the_kernels_ahead_have_ended(source: Path) -> None:
    for kernel in kernels_of(source):
        waits, stores = kernel.places(WAIT), kernel.places(STORE)
        assert waits, f"{kernel.name} does not wait"
        assert not stores or min(waits) < min(stores), kernel.name


def products() -> list[Kernel]:
    return [*kernels_of(CUDA / "decode_product.cu"), *kernels_of(CUDA / "decode_product_mma.cu")]


@pytest.mark.slow
@needs_tools
def test_weights_are_on_their_way_before_a_product_waits() -> None:
    """Its own, and those of the next one into the second cache."""
    for kernel in products():
        (wait,) = kernel.places(WAIT)
        before = [place for place in kernel.places(COPY, LOAD) if place < wait]
        assert len(before) >= (16 if "tiles" in kernel.name else 8), kernel.name
        assert any(place < wait for place in kernel.places(PREFETCH)), kernel.name


@pytest.mark.slow
@needs_tools
def test_a_product_loads_its_inputs_together() -> None:
    """None waits for a store of another one: that would be a trip to the second cache for each."""
    for kernel in products():
        (wait,) = kernel.places(WAIT)
        store = min(place for place in kernel.places(SHARED_STORE) if place > wait)
        barrier = min(place for place in kernel.places(BARRIER) if place > store)
        loads = kernel.places(LOAD)
        assert any(wait < place < store for place in loads), kernel.name
        assert not any(store < place < barrier for place in loads), kernel.name


@pytest.mark.slow
@needs_tools
def test_blocks_of_the_next_product_fit_beside_those_that_run() -> None:
    """Else it would begin later: two blocks of 256 threads share 65,536 registers."""
    for kernel in products():
        assert kernel.used.registers <= 128, kernel


@needs_tools
@pytest.mark.slow
def test_attention_asks_for_keys_and_values_at_once() -> None:
    """Those of the four positions that a warp takes at a time, before the first is summed up."""
    for kernel in kernels_of(CUDA / "decode_attention.cu"):
        components = int(re.findall(r"cached_attention<[^0-9]*(\d+)", kernel.name)[0])  # of a lane
        first_sum = min(kernel.places(SHUFFLE))
        begin = max(place for place in kernel.places(BARRIER) if place < first_sum)
        loads = [place for place in kernel.places(LOAD) if begin < place < first_sum]
        assert len(loads) == 2 * 4 * components


@pytest.mark.slow
@needs_tools
def test_a_slice_of_ssd_is_loaded_at_once_while_another_is_multiplied() -> None:
    """On tensor cores: no load waits for another, and none is waited for before the products."""
    of_both_passes = [*kernels_of(CUDA / "ssd.cu"), *kernels_of(CUDA / "ssd_gradients.cu")]
    kernels = [kernel for kernel in of_both_passes if "TensorTile" in kernel.name]
    assert len(kernels) == 14
    assert all(kernel.places("HMMA") for kernel in kernels)
    for kernel in kernels:
        if "forward<" not in kernel.name:
            continue
        barriers = kernel.places(BARRIER)
        for begin, end in itertools.pairwise(barriers):
            within = range(begin, end)
            products = [place for place in kernel.places("HMMA") if place in within]
            loads = [place for place in kernel.places(LOAD) if place in within]
            stored = [place for place in kernel.places(SHARED_STORE) if place in within]
            if not (products and stored):
                continue
            loads = [place for place in loads if place < stored[0]]
            assert loads and products[-1] < stored[0], kernel.name
            branches = [place for place in kernel.places("BRA") if place in within]
            assert not [place for place in branches if loads[0] < place < loads[-1]], kernel.name
