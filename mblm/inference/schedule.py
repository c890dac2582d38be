"""Which stages take in what after so many bytes: pure functions of two integers.

Stage n covers ``patch_sizes[n]`` bytes with a position; the last stage, the local one, covers one.
A row that has *taken* in so many bytes has its local stage after the last of them, and every stage
above after the patches that were complete before that byte: an upper stage takes in a patch when
the byte after it comes. A sequence of stage n > 0 stands for one patch of the stage above it and
begins anew with the next. The start token, which every sequence has taken in, is not counted.
"""

from collections.abc import Sequence


def begin(patch_sizes: Sequence[int], n: int, taken: int) -> int:
    """The first byte that the sequence of stage n stands for."""
    return 0 if n == 0 else _last_multiple(patch_sizes[n - 1], taken)


def position(patch_sizes: Sequence[int], n: int, taken: int) -> int:
    """How many positions stage n has taken in since its sequence began."""
    is_local = n + 1 == len(patch_sizes)
    end = taken if is_local else max(taken - 1, 0)
    return (end - begin(patch_sizes, n, taken)) // patch_sizes[n]


def tail_begin(patch_sizes: Sequence[int], taken: int) -> int:
    """The first byte that a row must remember: that of the first stage's unfinished patch."""
    return _last_multiple(patch_sizes[0], taken)


def left_in_patch(patch_sizes: Sequence[int], taken: int) -> int | None:
    """Bytes that the local stage takes in before a stage above does; None without one above.

    It is 0 at the end of a patch, where the byte to come makes a stage above due.
    """
    if len(patch_sizes) == 1:
        return None
    return 0 if taken == 0 else -taken % patch_sizes[-2]


def pays_to_wait(patch_size: int, left: Sequence[int]) -> bool:
    """Whether rows at the end of a patch wait for others, which have so many steps left in theirs.

    Rows that end their patches together are one call of the stages above, from then on. The step at
    which all do, counted modulo the patch, is where they wait the least in sum: this one, unless in
    some number of steps to come at least as many rows end a patch as if they were spread evenly.

    Args:
        patch_size: Steps of a patch.
        left: Of every row; 0 for those at the end of a patch.
    """
    others = sorted(steps for steps in left if steps)
    return any(n * patch_size >= steps * len(left) for n, steps in enumerate(others, 1))


def _last_multiple(size: int, taken: int) -> int:
    """The beginning of the patch of so many bytes that the last byte taken in lies in."""
    return max(taken - 1, 0) // size * size
