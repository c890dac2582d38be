"""The mean loss over batches, shared out among the workers."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from mblm.train.core.parallel import Workers
from mblm.train.core.sampling import ShardedBatches


def mean_loss(
    forward: Callable[[Any], torch.Tensor],
    loader: "DataLoader[Any]",
    workers: Workers,
    *,
    max_batches: int | None,
    in_step: bool,
    show: Callable[[range], Any] = iter,
) -> tuple[float, float]:
    """The mean over all batches of a batch's loss; each worker takes every ``world_size``-th.

    Args:
        forward: The loss of a batch, a scalar.
        loader: Gives this worker its batches, or every worker all of them.
        workers: The workers.
        max_batches: At most how many batches to take, all workers together.
        in_step: Whether all workers must call ``forward`` equally often, as they do with FSDP.
        show: Wraps the indices of this worker's batches, as a progress bar does.

    Returns:
        The mean, the same on all workers, and the seconds that ``forward`` took on this one.

    Raises:
        ValueError: There is no batch.
    """
    sampler: Any = loader.batch_sampler
    is_sharded = isinstance(sampler, ShardedBatches)
    total = sampler.total if is_sharded else len(loader)
    total = min(total, max_batches or total)
    if total == 0:
        raise ValueError("no batch to evaluate on: the dataset is empty")
    mine = range(workers.rank, total, workers.world_size)
    batches = iter(loader) if is_sharded else _every(loader, workers)
    loss = torch.zeros((), dtype=torch.float64, device=workers.device)
    seconds = 0.0
    for _ in show(mine):
        batch = next(batches)
        start = workers.clock()
        loss += forward(batch).double()
        seconds += workers.clock() - start
    if in_step and len(mine) < math.ceil(total / workers.world_size):
        # The others gather weights for one more batch, and need this worker's shards.
        forward(loader.collate_fn([loader.dataset[0]]))
    losses, count = workers.sum(float(loss), len(mine))
    return losses / count, seconds


def _every(loader: "DataLoader[Any]", workers: Workers) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index % workers.world_size == workers.rank:
            yield batch
