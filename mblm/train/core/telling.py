"""What a run says on standard error: what it will do, and what came out."""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from mblm.train.core.config import Lineage
from mblm.train.core.schedule import Plan


def tell(log: logging.Logger, message: str) -> None:
    """Say something that must not be missed, on the main worker."""
    log.error(message)
    print(message, file=sys.stderr, flush=True)


def format_loss(loss: float, unit: str) -> str:
    """A loss for people: of bytes in bits."""
    return f"{loss / math.log(2):.3f} bits per byte" if unit == "byte" else f"loss {loss:.4f}"


def describe_run(
    count: int,
    parts: Mapping[str, int],
    lineage: Lineage,
    plan: Plan,
    *,
    done: int,
    elements: int,
    unit: str,
    workers: int,
    folder: Path,
) -> list[str]:
    """What is trained, on what, for how long and where it writes, a line for each.

    There are ``count`` parameters, those of parts by their names; ``done`` are steps of a run that
    goes on, ``elements`` those of a step, all workers together.
    """
    around = {"around them": count - sum(parts.values())} if parts else {}
    told = ", ".join(f"{name} {number:,}" for name, number in {**parts, **around}.items())
    data, source = lineage.training_data, lineage.training_data.dataset
    if data.files:
        source = next(iter(data.first)) if data.files == 1 else f"{data.files:,} files"
        source += f", {data.total:,} bytes"
    sizes = f"{data.size:,} {'sample' if data.in_samples else unit}s to train on"
    validations = len(plan.validation_points)
    steps = [
        f"{plan.gradient_steps:,} steps of {elements:,} {unit}s",
        f"of which {done:,} are done" * bool(done),
        f"{validations} validation{'s' * (validations != 1)}",
        f"{workers} processes" * (workers > 1),
    ]
    return [
        f"Model: {count:,} parameters" + f" ({told})" * bool(told),
        f"Data: {source}; {sizes}, {lineage.validation_data.size:,} to validate",
        f"Plan: {', '.join(filter(None, steps))}; writes to {folder}",
    ]
