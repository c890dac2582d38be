"""Several datasets in one: each sample is of a source that is drawn by its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from typing_extensions import Unpack

from mblm.data.datasets import DistributedDataset, DistributedDatasetConfig

_T = TypeVar("_T")


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that are not above 0 or do not sum to 1."""
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"sources: expected weights above 0, got {weight} for {name!r}")
    if abs((total := sum(weights.values())) - 1) > 1e-6:
        raise ValueError(f"sources: expected weights that sum to 1, got {total:.6g}")


class Mixture(DistributedDataset[_T]):
    """Samples from anywhere in several datasets, so many of each as its weight says.

    Seed and place decide a sample, and nothing else: which source, and where in it. Places are
    numbered over all workers and, by the offset, over epochs, so that no two draw the same, and a
    run goes on anywhere. An epoch has as many samples as the sources have together; as these are
    drawn, it misses some and has others twice.

    Args:
        parts: The whole datasets by name, with samples of one length.
        weights: Their shares of the samples, which sum to 1.
        seed: Decides what is drawn.
        config: ``seq_len, worker_id, num_workers`` of ``DistributedDataset``.

    Attributes:
        parts, weights: As given, in the order of their names.

    Raises:
        ValueError: Weights that do not sum to 1 or are of other parts; samples of another length,
            or too few for the workers.
    """

    def __init__(
        self,
        parts: Mapping[str, DistributedDataset[_T]],
        weights: Mapping[str, float],
        seed: int,
        **config: Unpack[DistributedDatasetConfig],
    ) -> None:
        check_weights(weights)
        if parts.keys() != weights.keys():
            raise ValueError(f"weights: expected one for each of {[*parts]}, got {[*weights]}")
        for name, part in parts.items():
            if part.seq_len != config["seq_len"]:
                raise ValueError(
                    f"parts: expected samples of {config['seq_len']} as seq_len says, {name!r} has "
                    f"samples of {part.seq_len}"
                )
        self._names = sorted(parts)  # in whatever order a configuration has them
        self.parts = {name: parts[name] for name in self._names}
        self.weights = {name: weights[name] for name in self._names}
        self._until = np.cumsum(list(self.weights.values()))
        self._seed = seed
        samples = sum(len(part) for part in parts.values())
        super().__init__(data_size=samples * config["seq_len"], is_sequential=True, **config)

    def lineage(self) -> list[tuple[str, int]]:
        """The files of all sources."""
        parts = self.parts.items()
        return [(f"{name}: {file}", size) for name, part in parts for file, size in part.lineage()]

    def draw(self, place: int) -> tuple[str, int]:
        """The source of the sample at a place, and the element of it that the sample starts at."""
        draws = np.random.SeedSequence((self._seed, place)).generate_state(2, np.uint64).tolist()
        share = draws[0] / 2**64 * self._until[-1]
        index = int(np.searchsorted(self._until, share, side="right"))
        name = self._names[min(index, len(self._names) - 1)]
        part = self.parts[name]
        starts = part._data_size - (part.seq_len - 1 if part.is_sequential else 0)
        return name, draws[1] * starts >> 64

    def get_sample(self, from_idx: int) -> _T:
        """The sample at a place."""
        name, start = self.draw(from_idx)
        return self.parts[name].get_sample(start)
