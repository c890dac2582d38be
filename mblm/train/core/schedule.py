"""How long a run is, and when in it to log and to validate."""

import math
from dataclasses import dataclass

import torch

from mblm.train.core.config import CoreIoConfig, CoreTrainConfig


@dataclass(frozen=True)
class Plan:
    """The length of a run, the same for every worker.

    Attributes:
        elements_per_batch: Elements that a batch of one worker counts for.
        batches: Batches that every worker trains on: as few as reach ``target_elements``.
        gradient_steps: Steps of the optimizer.
        start: Cumulative index of the first batch; not 0 after resuming from a checkpoint.
        log_points, validation_points: Cumulative indices of batches.
    """

    elements_per_batch: int
    batches: int
    gradient_steps: int
    start: int
    log_points: frozenset[int]
    validation_points: frozenset[int]


def plan_run(
    train: CoreTrainConfig, io: CoreIoConfig, *, input_seq_len: int, world_size: int, start: int
) -> Plan:
    """Plan a run of ``world_size`` workers from the batch with the cumulative index ``start``."""
    elements = train.batch_size
    if train.target_elements_strategy == "sequence":
        elements *= input_seq_len
    batches = math.ceil(train.target_elements // world_size / elements)
    return Plan(
        elements_per_batch=elements,
        batches=batches,
        gradient_steps=batches // train.gradient_accumulate_every,
        start=start,
        log_points=spread(start, batches, io.log_train_loss_amount),
        validation_points=spread(start, batches, io.validate_amount),
    )


def spread(start: int, batches: int, amount: int) -> frozenset[int]:
    """At most ``amount`` indices spread evenly over ``batches`` of them, the ends included."""
    last = start + batches - 1
    points = torch.linspace(start, last, min(amount, batches), dtype=torch.float32)
    return frozenset(min(point, last) for point in points.long().tolist())
