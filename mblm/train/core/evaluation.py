"""The mean loss over batches, shared out among the workers."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader

from mblm.data.dataset.mixture import Mixture
from mblm.data.datasets import DistributedDataset
from mblm.train.core.interrupt import start_loading
from mblm.train.core.parallel import Workers
from mblm.train.core.sampling import EpochBatches

Check: TypeAlias = Callable[[], None]


class Evaluation(NamedTuple):
    """What an evaluation came to, the same on all workers but for the seconds.

    Attributes:
        loss: The mean over the batches that count; NaN if there are none.
        batches: How many batches there were.
        left_out: The indices of those that do not count: their loss is NaN or infinite.
        seconds: What the forward passes of this worker took.
        of_sources: The loss on each source of a mixture; empty for other data.
    """

    loss: float
    batches: int
    left_out: list[int]
    seconds: float
    of_sources: Mapping[str, float] = MappingProxyType({})

    def trouble(self) -> str:
        """What is wrong with it, for a user; empty if nothing is."""
        if self.left_out:
            some = ", ".join(map(str, self.left_out[:8])) + ", ..." * (len(self.left_out) > 8)
            return (
                f"{len(self.left_out)} of {self.batches} batches are left out, their loss is NaN "
                f"or infinite: {some}"
            )
        if math.isnan(self.loss):
            return f"no entry of {self.batches} batches has loss: all are masked out or padding"
        return ""


class Sources:
    """The loaders that a model is evaluated with: one for each source of a mixture, or just one."""

    def __init__(
        self,
        dataset: DistributedDataset[Any],
        make_loader: "Callable[[DistributedDataset[Any]], DataLoader[Any]]",
    ) -> None:
        self.dataset: Any = dataset
        parts, self._weights = {"": dataset}, {"": 1.0}
        if isinstance(dataset, Mixture):
            parts, self._weights = dataset.parts, dataset.weights
        self._loaders = {name: make_loader(part) for name, part in parts.items()}
        self.generators = [loader.generator for loader in self._loaders.values()]

    def evaluate(
        self,
        forward: Callable[[Any], torch.Tensor],
        count: Callable[[Any], int],
        workers: Workers,
        *,
        max_batches: int | None,
        **how: Any,
    ) -> Evaluation:
        """Evaluate on every source, as `evaluate` does; the loss is their mean by their weights."""
        if max_batches is not None:
            max_batches = max(max_batches // len(self._loaders), 1)
        results = {
            name: evaluate(forward, count, loader, workers, max_batches=max_batches, **how)
            for name, loader in self._loaders.items()
        }
        if set(results) == {""}:
            return results[""]
        losses = {name: result.loss for name, result in results.items()}
        total = sum(self._weights[name] * loss for name, loss in losses.items())
        left_out: list[int] = []
        batches = 0
        for result in results.values():
            left_out += [batches + index for index in result.left_out]
            batches += result.batches
        seconds = sum(result.seconds for result in results.values())
        return Evaluation(total / sum(self._weights.values()), batches, left_out, seconds, losses)


def evaluate(
    forward: Callable[[Any], torch.Tensor],
    count: Callable[[Any], int],
    loader: "DataLoader[Any]",
    workers: Workers,
    *,
    max_batches: int | None,
    in_step: bool,
    epoch: int = 0,
    show: Callable[[range], Any] = iter,
    check: Check = lambda: None,
) -> Evaluation:
    """The mean of the batches' losses, weighted; each worker takes every ``world_size``-th.

    ``forward`` gives a batch's loss, ``count`` its weight: how many of its entries have loss. With
    ``in_step``, all workers call ``forward`` equally often, as they must with FSDP. ``show`` wraps
    the numbers of a worker's batches, as a progress bar does; ``check``, which may raise to stop,
    is called by all workers after each but the last. ``max_batches`` are all workers' together.
    """
    sampler, total, is_sharded = loader.batch_sampler, len(loader), False
    if isinstance(sampler, EpochBatches):
        sampler.begin(epoch)  # another order, if it is shuffled
        total, is_sharded = sampler.total, sampler.world_size > 1
    total = min(total, max_batches or total)
    if total == 0:
        raise ValueError("no batch to evaluate on: the dataset is empty")
    mine = range(workers.rank, total, workers.world_size)
    batches: Iterator[Any] = start_loading(loader)
    if not is_sharded:
        batches = islice(batches, workers.rank, None, workers.world_size)
    losses: list[torch.Tensor] = []  # on the device: nothing waits for them here
    weights: list[int] = []
    seconds = 0.0
    rounds = math.ceil(total / workers.world_size)
    try:
        for number in show(range(rounds)):
            if number < len(mine):
                batch = next(batches)
                start = workers.clock()
                losses.append(forward(batch))
                seconds += workers.clock() - start
                weights.append(count(batch))
            elif in_step:
                # The others gather weights for one more batch, and need this worker's shards.
                forward(loader.collate_fn([loader.dataset[0]]))
            if number + 1 < rounds:
                check()
    finally:
        del batches  # and the loader's processes, whoever keeps an error's frames
    values = [float(loss) for loss in losses]
    bad = [index for index, value in zip(mine, values, strict=True) if not math.isfinite(value)]
    counted = [
        (value * weight, weight)
        for value, weight in zip(values, weights, strict=True)
        if math.isfinite(value)
    ]
    loss, weight = workers.sum(sum(v for v, _ in counted), sum(w for _, w in counted))
    left_out = sorted(index for of_worker in workers.gather(bad) for index in of_worker)
    return Evaluation(loss / weight if weight else math.nan, total, left_out, seconds)
