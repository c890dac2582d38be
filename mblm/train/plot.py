"""Curves of training runs as one picture: bits per byte, learning rate, speed."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mblm.utils.atomic import atomic_write

LOSS_FILE = "loss.csv"
METRICS_FILE = "metrics.csv"
COLUMNS = {"elements_seen", "kind", "loss", "lr", "timestamp"}

Curve = list[tuple[float, float]]


@dataclass
class Curves:
    """What a run logged: lists of ``(elements seen, value)``, the training of all workers together.

    Of a run of the published package, which has a ``loss.csv`` only, it is that of the first rank.
    Losses are in bits per byte, speed in elements a second, and seconds those that it had trained
    for, without what lies between a stop and a resume.
    """

    name: str
    train: Curve = field(default_factory=list)
    valid: Curve = field(default_factory=list)
    learning_rate: Curve = field(default_factory=list)
    speed: Curve = field(default_factory=list)
    seconds: Curve = field(default_factory=list)

    def by_time(self, curve: Curve) -> Curve:
        """A loss curve over minutes instead of elements."""
        minutes = {seen: seconds / 60 for seen, seconds in self.seconds}
        return [(minutes[seen], value) for seen, value in curve]

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.name}: no losses yet"
        seen, seconds = self.seconds[-1]
        best = min((bits for _, bits in self.valid if not math.isnan(bits)), default=None)
        told = "no validation yet" if best is None else f"at best {best:.3f} bits per byte"
        return f"{self.name}: {told}, {seen:,.0f} bytes in {seconds / 60:,.1f} minutes"


def read_curves(run: str | os.PathLike[str]) -> Curves:
    """Read the curves of a run, which may be training.

    Args:
        run: A run's folder, or its ``loss.csv`` or ``metrics.csv``.

    Raises:
        OSError: There is no such file.
        ValueError: It is none of a run's; the message names file and line.
    """
    file = Path(run)
    if file.is_dir():
        file /= METRICS_FILE if (file / METRICS_FILE).exists() else LOSS_FILE
    is_runs = file.name in (LOSS_FILE, METRICS_FILE)
    curves = Curves(file.absolute().parent.name if is_runs else file.stem)
    text = file.read_text(encoding="utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # a row may be half written
    found = set(rows.fieldnames or (() if text else COLUMNS))  # nothing stands in it yet
    if is_timed := "seconds" in found:  # metrics, which need no clock
        found.add("timestamp")
    if missing := COLUMNS - found:
        raise ValueError(f"{file}: not a run's losses, no column {', '.join(sorted(missing))}")
    first_rank, before = None, None
    for row in rows:
        try:
            seen, bits = float(row["elements_seen"]), float(row["loss"]) / math.log(2)
            rate, speed = float(row["lr"] or -1), float(row.get("elements_per_second") or "nan")
            if is_timed:
                clock = float(row["seconds"])
            else:
                clock = datetime.fromisoformat(row["timestamp"]).timestamp()
        except (TypeError, ValueError):
            raise ValueError(f"{file}, line {rows.line_num}: not a row of losses") from None
        first_rank = first_rank or row.get("gpu_rank")
        if row.get("gpu_rank") != first_rank or row["kind"] not in ("train", "valid"):
            continue
        if before is None:
            before = 0.0 if is_timed else clock
        passed = clock - before
        if passed < 0:  # a new process counts from 0; a clock was set back
            passed = clock if is_timed else 0.0
        before = clock
        last, total = curves.seconds[-1] if curves.seconds else (0.0, 0.0)
        curves.seconds.append((seen, total + passed))
        if row["kind"] == "valid":
            curves.valid.append((seen, bits))
            continue
        curves.train.append((seen, bits))
        curves.learning_rate.append((seen, rate))
        if "elements_per_second" not in row and passed:
            speed = (seen - last) / passed
        if not math.isnan(speed):
            curves.speed.append((seen, speed))
    return curves


def plot(runs: Sequence[Path], out: Path) -> list[Curves]:
    """Write a picture of the runs' curves, and return them.

    Args:
        runs: Folders of runs, or their ``loss.csv`` or ``metrics.csv``.
        out: The picture; its suffix says the format, such as ``.png``.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: matplotlib is missing, a run cannot be read, none has losses yet, or the format
            is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install 'mblm[plot]'") from error

    figure = Figure(figsize=(12, 7), layout="constrained")
    (losses, by_time), (rates, speeds) = figure.subplots(2, 2, height_ratios=[2, 1])
    all_curves = [read_curves(run) for run in runs]
    if not any(curves.seconds for curves in all_curves):
        raise ValueError(", ".join(map(str, all_curves)))
    for number, curves in enumerate(all_curves):
        color = f"C{number % 10}"
        for axes, of in ((losses, list), (by_time, curves.by_time)):
            _draw(axes, of(curves.train), color=color, alpha=0.4, linewidth=1)
            _draw(axes, of(curves.valid), color=color, marker=".")
        losses.plot([], [], color=color, label=curves.name)
        _draw(rates, curves.learning_rate, color=color)
        _draw(speeds, curves.speed, color=color, linewidth=1)
    losses.set(xlabel="bytes", ylabel="bits per byte (pale: training, dots: validation)")
    by_time.set(xlabel="minutes of training")
    by_time.sharey(losses)
    rates.set(xlabel="bytes", ylabel="learning rate")
    speeds.set(xlabel="bytes", ylabel="bytes a second", ylim=(0, None))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    losses.legend()
    with atomic_write(out) as stream:
        figure.savefig(stream, format=out.suffix[1:] or None, dpi=120)
    return all_curves


def _draw(axes: Any, curve: Curve, **style: Any) -> None:
    axes.plot(*(zip(*curve, strict=True) if curve else ([], [])), **style)
