"""Losses that are NaN or infinite: which they were, and the end of a run that has too many."""

import math

import torch

from mblm.train.core.parallel import Workers


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient was NaN or infinite in too many steps in a row."""


def find_bad_losses(losses: list[torch.Tensor], workers: Workers, end: int) -> str:
    """Tell which losses of a step are not finite, by rank and batch; empty if all are.

    Called by all workers, each with the losses of its batches, the last of which was ``end - 1``.
    """
    return "; ".join(
        f"loss {loss} on rank {rank}, batch {index}"
        for rank, of_rank in enumerate(workers.gather([float(loss) for loss in losses]))
        for index, loss in enumerate(of_rank, start=end - len(of_rank))
        if not math.isfinite(loss)
    )
