"""What a run says on standard error: what it will do, and what came out."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path


def format_loss(loss: float, unit: str) -> str:
    """A loss for people: of bytes in bits."""
    return f"{loss / math.log(2):.3f} bits per byte" if unit == "byte" else f"loss {loss:.4f}"


def describe_model(parameters: int, parts: Mapping[str, int]) -> str:
    """One line: the parameters, of parts and of what is around them."""
    counts = {**parts, "around them": parameters - sum(parts.values())} if parts else {}
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"Model: {parameters:,} parameters" + (f" ({told})" if told else "")


Sources = Sequence[tuple[str, int]]


def describe_data(name: str, training: Sources, validation: Sources, unit: str) -> str:
    """One line: the files, their size, and that of the parts.

    Args:
        name: The dataset's class, by which its `lineage` tells the size of the part.
        training, validation: The lineages of the two parts.
        unit: What is counted.
    """
    files = [source for source in training if source[0] != name]
    if files:
        told = files[0][0] if len(files) == 1 else f"{len(files):,} files"
        told += f", {sum(size for _, size in files):,} {unit}s"
    else:
        told = name
    parts = [dict(training).get(name), dict(validation).get(name)]
    if None not in parts:
        told += f"; {parts[0]:,} {unit}s to train on, {parts[1]:,} to validate"
    return f"Data: {told}"


def describe_plan(
    *, steps: int, done: int, elements: int, unit: str, validations: int, workers: int, folder: Path
) -> str:
    """One line: steps and how much each takes, validations, processes, and where it writes."""
    counts = [f"{steps:,} steps of {elements:,} {unit}s"]
    if done:
        counts.append(f"of which {done:,} are done")
    counts.append(f"{validations} validation{'s' * (validations != 1)}")
    if workers > 1:
        counts.append(f"{workers} processes")
    return f"Plan: {', '.join(counts)}; writes to {folder}"
