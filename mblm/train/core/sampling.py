"""Which samples come when: shuffled by seed and epoch, started anywhere, shared among workers."""

from collections.abc import Iterator, Sized
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mblm.train.core.rng import Rng, get_rng, set_rng

T = TypeVar("T")

_CHUNK = 1 << 16  # indices that are Python integers at a time


class EpochSampler(Sampler[int]):
    """All indices of a dataset, in order or shuffled by nothing but the seed and the epoch.

    Attributes:
        epoch: The epoch whose order comes next.
        start: How many indices to leave out the next time; then it is 0 again.
    """

    def __init__(self, dataset: Sized, *, shuffle: bool, seed: int) -> None:
        self._dataset = dataset
        self._shuffle = shuffle
        self._seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        if not self._shuffle:
            yield from range(start, len(self))
            return
        # Mixed: torch's generator takes no more than 32 bits of a seed.
        seed = np.random.SeedSequence((self._seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        for chunk in torch.randperm(len(self), generator=generator)[start:].split(_CHUNK):
            yield from chunk.tolist()


class ShardedBatches(Sampler[list[int]]):
    """Every ``world_size``-th batch of a dataset, from batch ``rank`` on; the last may be short.

    Attributes:
        sampler: Gives the order of the samples.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, *, rank: int, world_size: int
    ) -> None:
        self.sampler = sampler
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size

    @property
    def total(self) -> int:
        """How many batches the workers have together."""
        return -(-len(self.sampler) // self._batch_size)

    def __len__(self) -> int:
        return len(range(self._rank, self.total, self._world_size))

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        mine = self._rank
        for position, index in enumerate(self.sampler):
            if position // self._batch_size == mine:
                batch.append(index)
            if batch and (len(batch) == self._batch_size or position == len(self.sampler) - 1):
                yield batch
                batch = []
                mine += self._world_size


class TrainBatches(Generic[T]):
    """The batches of a training loader, which can start within an epoch as if it had come there.

    The trainer's own sampler leaves out what comes before. Any other loader is started with the
    random numbers that the epoch began with and asked for the batches before, which are dropped.

    Attributes:
        epoch: The epoch that comes next.
        epoch_rng: The generators' states when the present epoch began.
    """

    def __init__(self, loader: "DataLoader[T]") -> None:
        self._loader = loader
        self.epoch = 0
        self.epoch_rng: Rng | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[T]:
        """Iterate over the epoch from a batch on; the generators stay as they are."""
        sampler: Any = self._loader.sampler
        if isinstance(sampler, EpochSampler):
            sampler.epoch = self.epoch
            sampler.start = batch * (self._loader.batch_size or 1)
            return iter(self._loader)
        if batch == 0 or self.epoch_rng is None:
            self.epoch_rng = get_rng()
            return self._after(batch)
        now = get_rng()
        set_rng(self.epoch_rng)
        items = self._after(batch)
        set_rng(now)
        return items

    def _after(self, batch: int) -> Iterator[T]:
        items = iter(self._loader)
        for _ in range(batch):
            next(items)
        return items
