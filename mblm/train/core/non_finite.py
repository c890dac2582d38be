"""Steps that teach nothing: with losses that are NaN or infinite, or without a gradient."""

import math
from collections.abc import Callable

import torch

from mblm.train.core.config import CoreTrainConfig
from mblm.train.core.parallel import Workers
from mblm.train.core.run import Run


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient was NaN or infinite in too many steps in a row."""


def judge_step(
    run: Run,
    config: CoreTrainConfig,
    workers: Workers,
    norm: float,
    losses: list[torch.Tensor],
    place: str,
    tell: Callable[[str], object],
) -> None:
    """Tell of a step that was left out or learned nothing; end a run that has too many of them.

    Called by all workers, each with the losses of its batches, the last of which was at a place.
    """
    position = run.position
    if math.isfinite(norm):
        position.non_finite = 0
        if norm == 0:
            _judge_no_gradient(run, config, tell)
        return
    bad = "; ".join(
        f"loss {loss} on rank {rank}, batch {index}"
        for rank, of_rank in enumerate(workers.gather([float(loss) for loss in losses]))
        for index, loss in enumerate(of_rank, start=position.step - len(of_rank))
        if not math.isfinite(loss)
    )
    if not bad and run.scaler.is_enabled():
        return  # The scale was too large for half precision, and is smaller now.
    position.non_finite += 1
    message = (
        f"Step left out after {place}: {bad or 'the gradient is not finite, though the losses are'}"
        f" ({position.non_finite} in a row)"
    )
    tell(message)
    if config.non_finite_loss == "stop" and position.non_finite >= config.max_non_finite_steps:
        raise NonFiniteLossError(message)


def _judge_no_gradient(run: Run, config: CoreTrainConfig, tell: Callable[[str], object]) -> None:
    position = run.position
    position.without_gradient += 1
    steps = position.done // config.gradient_accumulate_every
    message = (
        f"The gradient was zero in {position.without_gradient} of {steps} steps: do entries of "
        "their batches have loss, or are all masked out or padding?"
    )
    never_learned = position.without_gradient == steps
    if never_learned and steps in (config.max_non_finite_steps, run.plan.gradient_steps):
        raise ValueError(message)
    if position.without_gradient == 1:
        tell(message)
