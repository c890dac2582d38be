"""How long a run is, its learning rates, and when in it to log and to validate."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mblm.train.core.config import CoreTrainConfig, GenericEntryConfig


@dataclass(frozen=True)
class Plan:
    """The length of a run, the same for every worker.

    Attributes:
        elements_per_batch: Elements that a batch of one worker counts for.
        batches: Batches that every worker trains on: as few as reach ``target_elements`` and make
            whole steps.
        gradient_steps: Steps of the optimizer.
        added: How many of the batches are there only to make the last step whole.
        log_points, validation_points: Cumulative indices of batches.
        sample_points: Those of the validations at which the model writes.
    """

    elements_per_batch: int
    batches: int
    gradient_steps: int
    added: int
    log_points: frozenset[int]
    validation_points: frozenset[int]
    sample_points: frozenset[int]


def plan_run(config: GenericEntryConfig[Any, Any, Any], world_size: int, start: int = 0) -> Plan:
    """Plan a run of ``world_size`` workers from the batch with the cumulative index ``start``."""
    train, io = config.train, config.io
    elements = train.batch_size
    if train.target_elements_strategy == "sequence":
        elements *= config.params.input_seq_len
    wanted = -(-train.target_elements // (world_size * elements))
    every = train.gradient_accumulate_every
    if every > wanted:
        raise ValueError(
            f"train.gradient_accumulate_every: a step takes {every} batches, but "
            f"train.target_elements {train.target_elements} are no more than {wanted} batches of "
            f"{elements} elements on {world_size} workers: not one step"
        )
    steps = -(-wanted // every)
    batches = steps * every
    validations = sorted(spread(start, batches, io.validate_amount))
    return Plan(
        elements_per_batch=elements,
        batches=batches,
        gradient_steps=steps,
        added=batches - wanted,
        log_points=spread(start, batches, io.log_train_loss_amount),
        validation_points=frozenset(validations),
        sample_points=frozenset(
            validations[number] for number in spread(0, len(validations), io.sample_amount)
        ),
    )


def check_start(plan: Plan, done: int, epoch: int, batch: int, batches: int) -> None:
    """Refuse a place to start from that is past the run's end or not in its data.

    ``done`` batches of the run are done; the next is in an epoch of so many ``batches``.
    """
    if done > plan.batches:
        raise ValueError(
            f"train.target_elements: they are reached after {plan.batches} batches, and the run "
            f"that is to go on has {done} behind it; expected at least as many"
        )
    if epoch < 0:
        raise ValueError(f"resume.next_epoch_index: expected at least 0, got {epoch}")
    if batch and not 0 < batch < batches:  # an epoch without batches is passed over
        raise ValueError(
            f"resume.next_batch_index: expected a batch of an epoch of {batches}, got {batch}: are "
            "the data fewer than those of the run before?"
        )


def learning_rate_factor(train: CoreTrainConfig, steps: int, step: int) -> float:
    """The share of the learning rate that a step takes, counted from 0, of a run of ``steps``.

    It rises linearly from 0.1 to 1 in the warm-up, then falls to ``min_lr_factor`` as
    ``lr_schedule`` says. It depends on nothing else: a run that goes on takes the same.
    """
    warmup = math.floor(steps * train.warmup_steps_perc)
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    falling = steps - warmup
    if train.lr_schedule == "wsd":
        falling = math.floor(steps * train.decay_ratio)
    left = min(max(steps - step, 0) / max(falling, 1), 1.0)
    if train.lr_schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return train.min_lr_factor + (1 - train.min_lr_factor) * left


def spread(start: int, batches: int, amount: int) -> frozenset[int]:
    """At most ``amount`` indices spread evenly over ``batches`` of them.

    The last is one of them, and if there are several, the first.
    """
    last = batches - 1
    points = torch.linspace(0, last, min(amount, batches), dtype=torch.float32).long()
    points[-1:] = last  # a single point would be the first, and a large one is rounded
    return frozenset((start + points.clamp(max=last)).tolist())
