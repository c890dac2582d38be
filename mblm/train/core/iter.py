"""Iterate over something for many epochs, starting anywhere."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SizedIterable(Protocol[T_co]):
    """What a data loader is: it has a length and can be iterated over again and again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


@dataclass
class EpochCyclerYield(Generic[T]):
    """An item, where it is, and where the one after it will be."""

    epoch: int
    batch: int
    item: T
    next_epoch: int
    next_batch: int


def epoch_cycler(
    seq: SizedIterable[T],
    *,
    before_new_epoch: Callable[[int], Any] | None = None,
    start_epoch: int = 0,
    start_batch: int = 0,
    max_iters: int | None = None,
) -> Generator[EpochCyclerYield[T], None, None]:
    """Yield the items of a sequence again and again, an epoch being one time through.

    An epoch without items is passed over; a sequence that never has any is waited for without end.

    Args:
        seq: Has a length, which may change between epochs, and can be iterated over repeatedly.
            If it has a method ``iter_from(batch)``, that skips what comes before ``start_batch``.
        before_new_epoch: Called with its number right before an epoch starts, also the first.
        start_epoch: Number of the first epoch.
        start_batch: Index of the item of the first epoch to start with.
        max_iters: How many items to yield in all; endless by default.

    Raises:
        IndexError: ``start_batch`` is not 0 and not in the sequence.
    """
    if start_batch and start_batch >= len(seq):
        raise IndexError(f"start_batch: {start_batch} is beyond a sequence of {len(seq)} items")
    iter_from = getattr(seq, "iter_from", lambda start: islice(seq, start, None))
    epoch, yielded = start_epoch, 0
    while yielded != max_iters:
        if before_new_epoch is not None:
            before_new_epoch(epoch)
        length = len(seq)
        items = iter_from(start_batch) if length else iter(())
        for batch in range(start_batch, length):
            if yielded == max_iters:
                return
            is_last = batch == length - 1
            yield EpochCyclerYield(
                epoch=epoch,
                batch=batch,
                item=next(items),
                next_epoch=epoch + is_last,
                next_batch=0 if is_last else batch + 1,
            )
            yielded += 1
        start_batch = 0
        epoch += 1
