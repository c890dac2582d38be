"""What a run says on standard error: what it will do, and what came out."""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from mblm.train.core.config import DataLineage
from mblm.train.core.schedule import Plan


def tell(log: logging.Logger, message: str) -> None:
    """Say something that must not be missed, on the main worker."""
    log.error(message)
    print(message, file=sys.stderr, flush=True)


def format_loss(loss: float, unit: str) -> str:
    """A loss for people: of bytes in bits."""
    return f"{loss / math.log(2):.3f} bits per byte" if unit == "byte" else f"loss {loss:.4f}"


def describe_model(parameters: int, parts: Mapping[str, int]) -> str:
    """The parameters in all, of parts and of what is around them."""
    counts = {**parts, "around them": parameters - sum(parts.values())} if parts else {}
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"Model: {parameters:,} parameters" + (f" ({told})" if told else "")


def describe_data(training: DataLineage, validation: DataLineage, unit: str) -> str:
    """The files, their size, and that of the parts in elements of this name."""
    source = training.dataset
    if training.files:
        source = next(iter(training.first)) if training.files == 1 else f"{training.files:,} files"
        source += f", {training.total:,} bytes"
    unit = "sample" if training.in_samples else unit
    parts = f"{training.size:,} {unit}s to train on, {validation.size:,} to validate"
    return f"Data: {source}; {parts}"


def describe_plan(plan: Plan, done: int, elements: str, workers: int, folder: Path) -> str:
    """Steps and how much each takes, validations, processes, and where it writes."""
    counts = [f"{plan.gradient_steps:,} steps of {elements}"]
    if done:
        counts.append(f"of which {done:,} are done")
    validations = len(plan.validation_points)
    counts.append(f"{validations} validation{'s' * (validations != 1)}")
    if workers > 1:
        counts.append(f"{workers} processes")
    return f"Plan: {', '.join(counts)}; writes to {folder}"
