"""The order of instructions that decoding's kernels are made of, as a GPU runs them.

The assembler may move what a source states in order: what is said there of loads that are under way
while a kernel waits holds only if it holds here.
"""

import pytest

from tests.packaging.sass import (
    CSRC,
    CUOBJDUMP,
    NVCC,
    STORE,
    WAIT,
    WHAT_LACKS,
    kernels_in,
    kernels_of,
)

needs_tools = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason=f"lacks {WHAT_LACKS}")
# The sources of a unit of decoding, whose kernels begin before those ahead of them have ended.
DECODING = [path.name for path in sorted(CSRC.glob("cuda/decode_*.cu")) if "graph" not in path.name]
QUICK = {"decode_rows.cu"}


def slow_but_few(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


@needs_tools
@pytest.mark.parametrize("source", slow_but_few(DECODING))
def test_nothing_is_written_before_the_kernels_ahead_have_ended(source: str) -> None:
    for kernel in kernels_of(source):
        waits, stores = kernel.places(WAIT), kernel.places(STORE)
        assert waits, f"{kernel.name} does not wait"
        assert not stores or min(waits) < min(stores), kernel.name


def test_a_listing_is_read() -> None:
    listing = """
        Function : _Z1fPf
    .headerflags    @"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64+0x10] ;  /* 0x0 */
        /*0020*/                   ACQBULK ;                  /* 0x0 */
        Function : _Z1gv
        /*0000*/                   EXIT ;                     /* 0x0 */
"""
    first, second = kernels_in(listing)
    assert first.code[1] == "LDG.E.128 R4, desc[UR4][R2.64+0x10]"
    assert first.places("LDG") == [1] and first.places("LDGSTS", "LD") == []
    assert (first.places(WAIT), second.code) == ([2], ("EXIT",))
