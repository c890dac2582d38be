"""Which samples come when: by seed and epoch alone, from anywhere on."""

from collections.abc import Iterator, Sized
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mblm.data.datasets import Batch, DistributedDataset
from mblm.train.core.interrupt import start_loading
from mblm.utils.seed import Rng, get_rng, set_rng

T = TypeVar("T")


class EpochBatches(Sampler[Batch]):
    """The batches of an epoch, in order or shuffled by seed and epoch alone, from any of them on.

    The dataset's length may change between epochs. Of ``world_size`` workers that share the batches
    out, this is ``rank``. The ``generator`` is for the loader, which seeds its workers with it.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._rank = rank
        self.world_size = world_size
        self.generator = torch.Generator()
        self.begin(0)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Let an epoch come next, from the batch ``start`` on."""
        self._epoch, self._start = epoch, start
        self.generator.manual_seed(_mix(self._seed, epoch))

    @property
    def total(self) -> int:
        """How many batches there are, all workers together."""
        short = 0 if self._drop_last else self._batch_size - 1
        return (len(self._dataset) + short) // self._batch_size

    def __len__(self) -> int:
        return len(range(self._rank, self.total, self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        epoch, start, self._start = self._epoch, self._start, 0
        offset = getattr(self._dataset, "sample_offset", 0)
        samples: Any = range(len(self._dataset))
        if self._shuffle:
            generator = torch.Generator().manual_seed(_mix(self._seed, epoch))
            samples = torch.randperm(len(samples), generator=generator).numpy()
        for number in range(self._rank, self.total, self.world_size)[start:]:
            of_batch = samples[number * self._batch_size :][: self._batch_size]
            indices = of_batch.tolist() if self._shuffle else of_batch
            yield Batch(indices, (self._seed, epoch, number), offset)


class TrainBatches(Generic[T]):
    """The batches of a training loader, which can start within an epoch as if it had come there.

    Ours leaves out what comes before. Any other loader is started with the random numbers that the
    epoch began with, ``epoch_rng``, and asked for the batches before, which are dropped.

    Raises:
        ValueError: The loader's workers live longer than an epoch, and would not see its offset.
    """

    def __init__(self, loader: "DataLoader[T]") -> None:
        batches = loader.batch_sampler
        self._ours = batches if isinstance(batches, EpochBatches) else None
        dataset: Any = loader.dataset
        follows = self._ours is not None and all(
            getattr(type(dataset), name, None) is getattr(DistributedDataset, name)
            for name in ("__getitems__", "offset_to")
        )
        is_offset = getattr(dataset, "is_sequential", False)
        if loader.persistent_workers and is_offset and not follows:
            raise ValueError(
                "get_train_dataloader: with persistent_workers, a loader's workers keep the "
                "dataset as it is in the first epoch and never see the offset of another; leave "
                "persistent_workers out, or sampler, batch_sampler and shuffle to the trainer"
            )
        self._skips = follows or (self._ours is not None and loader.num_workers == 0)
        self._loader = loader
        self.epoch = 0
        self.epoch_rng: Rng | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[T]:
        """Iterate over the epoch from a batch on; the generators stay as they are."""
        if self._ours is not None:
            self._ours.begin(self.epoch, batch if self._skips else 0)
        if self._skips:
            return start_loading(self._loader)
        if batch == 0 or self.epoch_rng is None:
            self.epoch_rng = get_rng(self._loader.generator)
            return self._after(batch)
        now = get_rng()
        set_rng(self.epoch_rng, self._loader.generator)
        items = self._after(batch)
        set_rng(now)
        return items

    def close(self) -> None:
        """Let go of the loader, with which its processes end, those that stay included."""
        del self._loader

    def _after(self, batch: int) -> Iterator[T]:
        items = start_loading(self._loader)
        for _ in range(batch):
            next(items)
        return items


def _mix(seed: int, epoch: int) -> int:
    """A seed of both; torch's generator takes no more than 32 bits."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
