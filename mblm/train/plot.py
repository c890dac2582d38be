"""Curves of training runs, loss and learning rate, as one picture."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOSS_FILE = "loss.csv"
COLUMNS = {"gpu_rank", "elements_seen", "kind", "loss", "lr"}


@dataclass
class Curves:
    """What a run logged: lists of ``(elements seen, value)``.

    Attributes:
        name: Name of the run.
        train: Training loss in bits per byte, as the run's first logging rank saw it.
        valid: Validation loss in bits per byte.
        learning_rate: The learning rate.
    """

    name: str
    train: list[tuple[float, float]] = field(default_factory=list)
    valid: list[tuple[float, float]] = field(default_factory=list)
    learning_rate: list[tuple[float, float]] = field(default_factory=list)


def read_curves(run: Path) -> Curves:
    """Read the curves of a run.

    Args:
        run: A run's folder or its ``loss.csv``.

    Raises:
        OSError: There is no such file.
        ValueError: It is none of a run's, or holds no losses; the message names file and line.
    """
    file = run / LOSS_FILE if run.is_dir() else run
    curves = Curves(file.absolute().parent.name if file.name == LOSS_FILE else file.stem)
    with file.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        if missing := COLUMNS - set(rows.fieldnames or ()):
            raise ValueError(f"{file}: not a run's losses, no column {', '.join(sorted(missing))}")
        first_rank = None
        for row in rows:
            try:
                seen, nats, rate = (float(row[c]) for c in ("elements_seen", "loss", "lr"))
            except (TypeError, ValueError):
                raise ValueError(f"{file}, line {rows.line_num}: not a row of losses") from None
            first_rank = first_rank or row["gpu_rank"]
            if row["gpu_rank"] != first_rank:
                continue
            if row["kind"] == "train":
                curves.train.append((seen, nats / math.log(2)))
                curves.learning_rate.append((seen, rate))
            elif row["kind"] == "valid":
                curves.valid.append((seen, nats / math.log(2)))
    if not (curves.train or curves.valid):
        raise ValueError(f"{file}: no losses yet")
    return curves


def plot(runs: Sequence[Path], out: Path) -> list[Curves]:
    """Write a picture of the runs' curves, and return them.

    Args:
        runs: Folders of runs, or their ``loss.csv``.
        out: The picture; its suffix says the format, such as ``.png``.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: matplotlib is missing, a run cannot be read, or the format is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install 'mblm[plot]'") from error

    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    all_curves = [read_curves(run) for run in runs]
    for number, curves in enumerate(all_curves):
        color = f"C{number % 10}"
        if curves.train:
            losses.plot(*zip(*curves.train, strict=True), color=color, alpha=0.4, linewidth=1)
            rates.plot(*zip(*curves.learning_rate, strict=True), color=color)
        valid = list(zip(*curves.valid, strict=True)) or [(), ()]
        losses.plot(*valid, color=color, marker=".", label=curves.name)
    losses.set_ylabel("bits per byte\n(pale: training, dots: validation)")
    rates.set(xlabel="elements seen", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    losses.legend()
    figure.savefig(out, dpi=120)
    return all_curves
