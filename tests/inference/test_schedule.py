"""The schedule against a simulation of the hierarchy that goes byte by byte."""

import math
from itertools import product

import pytest

from mblm.inference import schedule

SEQ_LENS = [
    *product([1, 5]),
    *product([2, 3], [1, 2, 3]),
    *product([2], [1, 3], [1, 2]),
    *product([2], [1, 2], [1, 3], [1, 2]),
]


def patch_sizes(seq_lens: tuple[int, ...]) -> list[int]:
    return [math.prod(seq_lens[n + 1 :]) for n in range(len(seq_lens))]


class Simulated:
    """One list per stage: the positions of its sequence, each the bytes of its patch."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.taken = sizes, 0
        self.begins = [0] * len(sizes)
        self.positions: list[list[range]] = [[] for _ in sizes]

    def take_in(self) -> None:
        """The next byte, before which something happens to a stage and those below it."""
        byte, last = self.taken, len(self.sizes) - 1
        happened = last
        for n in reversed(range(last)):
            if byte % self.sizes[n] == 0:  # a patch is complete, or the first begins
                happened = n
        if byte and happened < last:
            size = self.sizes[happened]
            self.positions[happened].append(range(byte - size, byte))
        if happened < last or byte == 0:
            for below in range(happened + 1, last + 1):
                self.begins[below], self.positions[below] = byte, []
        self.positions[last].append(range(byte, byte + 1))
        self.taken += 1


@pytest.mark.parametrize("seq_lens", SEQ_LENS, ids=str)
def test_it_is_what_a_simulation_does(seq_lens: tuple[int, ...]) -> None:
    sizes = patch_sizes(seq_lens)
    simulated = Simulated(sizes)
    for taken in range(3 * math.prod(seq_lens) + 2):
        for n in range(len(sizes)):
            assert schedule.begin(sizes, n, taken) == simulated.begins[n]
            assert schedule.position(sizes, n, taken) == len(simulated.positions[n])
            # Nothing is left out and nothing is ahead.
            for index, patch in enumerate(simulated.positions[n]):
                assert patch.start == simulated.begins[n] + index * sizes[n]
        assert schedule.tail_begin(sizes, taken) == max(taken - 1, 0) // sizes[0] * sizes[0]
        simulated.take_in()


@pytest.mark.parametrize("seq_lens", SEQ_LENS, ids=str)
def test_an_upper_stage_has_room_for_every_position(seq_lens: tuple[int, ...]) -> None:
    sizes = patch_sizes(seq_lens)
    for taken in range(2 * math.prod(seq_lens) + 2):
        for n in range(1, len(sizes)):
            is_local = n + 1 == len(sizes)
            assert schedule.position(sizes, n, taken) < seq_lens[n] + is_local


def test_what_is_left_in_a_patch_ends_with_it() -> None:
    assert schedule.left_in_patch([1], 5) is None
    for taken in range(20):
        left = schedule.left_in_patch([12, 4, 1], taken)
        assert 0 <= left < 4 and (taken + left) % 4 == 0


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_rows_end_their_patches_together_where_they_wait_the_least(
    patch_size: int, rows: int
) -> None:
    for left in product(range(patch_size), repeat=rows):
        if 0 not in left:
            continue
        # All steps that rows wait if all end a patch after so many steps.
        waited = [sum((t - steps) % patch_size for steps in left) for t in range(patch_size)]
        assert schedule.pays_to_wait(patch_size, left) == (
            waited[0] >= min([*waited[1:], math.inf])
        )
