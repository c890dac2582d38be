"""The base class of datasets that are shared out to the workers of a distributed run."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict, TypeVar

import numpy as np
from torch.utils.data import Dataset, get_worker_info
from typing_extensions import Self

from mblm.utils.checks import check_integer
from mblm.utils.seed import seed_everything

_T = TypeVar("_T")


class DistributedDatasetConfig(TypedDict):
    """The keywords that every dataset passes on to ``DistributedDataset``.

    Keys:
        seq_len: Length of a sample.
        worker_id: This worker, in ``[0, num_workers)``; the global rank of a run.
        num_workers: Workers that share the data; the world size of a run.
    """

    seq_len: int
    worker_id: int
    num_workers: int


class Batch(list[int]):
    """The indices of a batch, with all that a loader's worker needs to draw its samples.

    A worker's random numbers would depend on the batches that it has had before, and its copy of
    the dataset would keep the offset that it was made with.

    Attributes:
        seed: Integers that decide the random numbers of the batch.
        offset: The dataset's ``sample_offset``.
    """

    def __init__(self, indices: Iterable[int], seed: tuple[int, ...], offset: int) -> None:
        super().__init__(indices)
        self.seed = seed
        self.offset = offset


class DistributedDataset(ABC, Dataset[_T]):
    """A map-style dataset of which every worker sees its own part.

    The data are ``data_size`` elements in a row. Worker ``w`` of ``W`` owns the elements
    ``[w·n, (w + 1)·n)`` with ``n = data_size // W``; up to ``W - 1`` elements at the end belong to
    nobody, so that all workers have equally much. A sequential dataset cuts its part into
    samples of ``seq_len`` elements, starting at ``sample_offset`` and leaving out what does not
    fill a sample at the end; otherwise an element is a sample by itself and ``seq_len`` is for
    the subclass to use.

    Args:
        data_size: Elements (such as bytes) that all workers have together.
        is_sequential: Whether a sample is a run of ``seq_len`` elements, or a single one.
        seq_len: Length of a sample; if not sequential, any integer, such as -1 where it means
            nothing to the subclass.
        worker_id: This worker, in ``[0, num_workers)``.
        num_workers: Workers that share the data.

    Attributes:
        is_sequential, seq_len: As given.
        sample_offset: Where in the worker's part the first sample starts; see ``offset_to``.

    Raises:
        TypeError: A number that is no integer.
        ValueError: No worker of that number, or not even one sample for every worker.
    """

    def __init__(
        self, data_size: int, is_sequential: bool, seq_len: int, worker_id: int, num_workers: int
    ) -> None:
        data_size = check_integer("data_size", data_size)
        seq_len = check_integer("seq_len", seq_len, 1 if is_sequential else None)
        worker_id = check_integer("worker_id", worker_id)
        num_workers = check_integer("num_workers", num_workers, 1)
        if not 0 <= worker_id < num_workers:
            raise ValueError(f"worker_id: expected one in [0, {num_workers}), got {worker_id}")
        needed = (seq_len if is_sequential else 1) * num_workers
        if data_size < needed:
            raise ValueError(
                f"data_size: {data_size} is too small for one sample per worker: expected at "
                f"least {needed} for {num_workers} workers and seq_len {seq_len}"
            )
        self._data_size = data_size
        self._worker_numel = data_size // num_workers
        self._worker_range_start = worker_id * self._worker_numel
        self._worker_range_end = self._worker_range_start + self._worker_numel

        self.is_sequential = is_sequential
        self.seq_len = seq_len
        self.sample_offset = 0

    def offset_to(self, offset: int) -> Self:
        """Start the first sample at ``offset`` modulo ``seq_len``; no effect if not sequential.

        A trainer offsets by the epoch, so that samples begin elsewhere in each.
        """
        if self.is_sequential:
            self.sample_offset = offset % self.seq_len
        return self

    def offset_one(self) -> Self:
        """Move the start of the first sample by one; no effect if not sequential."""
        return self.offset_to(self.sample_offset + 1)

    @abstractmethod
    def get_sample(self, from_idx: int) -> _T:
        """The sample that starts at element ``from_idx`` of all the data.

        For a sequential dataset, that is ``from_idx : from_idx + self.seq_len``.
        """

    def lineage(self) -> list[tuple[str, int]]:
        """Names and sizes of the files that the data are of, in their order. Default: none.

        A run notes them and goes on with the same only; in any case with the same class of dataset
        and as many elements.
        """
        return []

    def __len__(self) -> int:
        """How many samples this worker has at the present offset."""
        if not self.is_sequential:
            return self._worker_numel
        return (self._worker_numel - self.sample_offset) // self.seq_len

    def __iter__(self) -> Iterator[_T]:
        return (self[idx] for idx in range(len(self)))

    def __getitem__(self, idx: int) -> _T:
        """A sample; ``dataset[len(dataset)]`` is what follows the last.

        As in the published package: a subclass pads what the end of the data cuts off.
        """
        if not 0 <= idx <= len(self):
            raise IndexError(f"sample {idx} of a dataset with {len(self)} samples")
        stride = self.seq_len if self.is_sequential else 1
        return self.get_sample(self._worker_range_start + self.sample_offset + idx * stride)

    def __getitems__(self, indices: Sequence[int]) -> list[_T]:
        """The samples of a batch, as a ``DataLoader`` asks for them."""
        if isinstance(indices, Batch) and get_worker_info() is not None:
            seed_everything(np.random.SeedSequence(indices.seed).generate_state(1)[0])
            self.offset_to(indices.offset)
        return [self[index] for index in indices]
