"""What holds of a computation for any number of threads."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def assert_same_bits_for_any_threads(compute: Callable[[], Iterable[Tensor]]) -> None:
    """The results for 1, 2 and 3 threads are equal to the last bit."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(list(compute()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
