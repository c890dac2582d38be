"""The folder of a run: its configuration, losses, times and memory, and checkpoints.

<output_dir>/<name_model>_<run id>/
    config.yaml             the run's configuration, how to go on from its best model, a summary
    loss.csv, timemem.csv   rows of `CSVLossEntry` and `CSVTimeAndMemSnapshotEntry`
    metrics.csv             rows of `CSVMetricsEntry`
    samples/                what the model wrote at validations, if configured
    train.log               what the main worker tells
    <name_model>_top<i>.pth the best models, best first
    state/                  training states
    tensorboard/, wandb/    if configured
"""

import csv
import glob
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mblm.data.types import ModelMode
from mblm.train.core.config import (
    CSVLossEntry,
    CSVMetricsEntry,
    CSVTimeAndMemSnapshotEntry,
    GenericEntryConfig,
    GenericOutputConfig,
    Lineage,
    ResumeConfig,
    SummaryStats,
)
from mblm.train.core.evaluation import Evaluation
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.loggers import Loggers, logger_names
from mblm.train.core.parallel import Workers
from mblm.train.core.run import Position
from mblm.train.core.training_state import STATES, SavedState, prune_states
from mblm.utils.atomic import remove_leftovers
from mblm.utils.checkpoint import read_checkpoint, save_model_state
from mblm.utils.cuda import cuda_memory_snapshot, cuda_properties
from mblm.utils.io import dump_yml
from mblm.utils.lock import hold
from mblm.utils.naming import naming_file

Config = GenericEntryConfig[Any, Any, Any]
Row = TypeVar("Row", bound=NamedTuple)


class RunFolder:
    """Writes what a run tells. All workers have one; the main worker writes, all may log losses.

    The main worker must hold the folder, see `hold_run`, while anything is written. Without a
    state that the run goes on from, it begins with empty files.

    Attributes:
        path, workers, log: As given.
        summary, lineage: What ``config.yaml`` says about the run.
        metrics: ``metrics.csv``.
    """

    def __init__(
        self,
        config: Config,
        options: CoreTrainerOptions,
        workers: Workers,
        path: Path,
        log: logging.Logger,
        resumed: SavedState | None,
    ) -> None:
        io, is_main = config.io, workers.is_main
        self.path = path
        self._config = config
        self._config_file = path / options.config_file_name
        self.workers = workers
        self.log = log
        self.best = BestModels(path, io.name_model, io.num_models_to_save, workers)
        self.summary = SummaryStats(
            training_start="",
            training_end="",
            num_workers=workers.world_size,
            cuda_devices=cuda_properties().cuda_devices,
            parameter_count=0,
            error=None,
        )
        logs_loss = workers.rank in io.enabled_loss_log_for_gpus
        self._loss = CsvLog(path / options.loss_file_name, CSVLossEntry, enabled=logs_loss)
        self._timemem = CsvLog(
            path / options.timemem_file_name, CSVTimeAndMemSnapshotEntry, enabled=is_main
        )
        self.metrics = CsvLog(path / "metrics.csv", CSVMetricsEntry, enabled=is_main)
        names = logger_names(io) if is_main else []
        self.loggers = Loggers(names, path, config.model_dump(mode="json"), log)
        self.lineage: Lineage | None = None
        self._resume = ResumeConfig(
            checkpoint_file="",
            next_epoch_index=-1,
            next_batch_index=-1,
            resumed_from=config.resume.checkpoint_file if config.resume else None,
        )
        if resumed is not None:
            self._resume = ResumeConfig.model_validate(resumed.manifest["resume"])
        elif is_main:
            for file in self._logs():
                file.begin()
        workers.barrier()

    def rewind(self, saved: SavedState, *, goes_same_way: bool) -> None:
        """Go back to a training state: drop what was written after it.

        Models found after it stay among the best if the run finds them again as it goes on.
        """
        # First: one that cannot be read is refused.
        self.best.restore(saved.manifest["best"], keeps_others=goes_same_way)
        if self.workers.is_main:
            step, sizes = saved.own["position"]["step"], saved.manifest.get("sizes", {})
            self.loggers.rewind(step)
            prune_states(self.path, after=step)  # first: they need the rows that are dropped
            for ours in (self._config_file, self.path / STATES / "*", self.path / "samples" / "*"):
                remove_leftovers(ours)
            for log in self._logs():
                log.begin()
                log.cut(sizes.get(log.file.name, log.file.stat().st_size))
        self._resume = ResumeConfig.model_validate(saved.manifest["resume"])
        self._resume.checkpoint_file = str(self.best.best_file() or "")
        self.workers.barrier()

    def manifest(self) -> dict[str, Any]:
        """What a training state holds of the folder, for `rewind`; called by all workers."""
        self.workers.barrier()  # they have logged their losses
        logs = self._logs() if self.workers.is_main else ()
        sizes = {log.file.name: log.file.stat().st_size for log in logs}
        return {"best": self.best.entries, "resume": self._resume.model_dump(), "sizes": sizes}

    def _logs(self) -> "tuple[CsvLog[Any], ...]":
        return self._loss, self._timemem, self.metrics

    def dump_config(self) -> None:
        """Write ``config.yaml``."""
        if self.workers.is_main:
            output: GenericOutputConfig[Any, Any, Any] = GenericOutputConfig(
                params=self._config.params,
                train=self._config.train,
                io=self._config.io,
                resume=self._resume,
                summary=self.summary,
                lineage=self.lineage,
            )
            dump_yml(self._config_file, output)

    def write_evaluation(
        self, kind: ModelMode, result: Evaluation, at: Position, epoch: int = -1, batch: int = -1
    ) -> None:
        """Log the loss of a validation or test, and those on sources, ``valid/<source>``."""
        self.write_loss(kind.value, result.loss, at, epoch, batch)
        for source, loss in result.of_sources.items():
            self.write_loss(f"{kind.value}/{source}", loss, at, epoch, batch)

    def write_loss(
        self, kind: str, loss: float, at: Position, epoch: int, batch: int, lr: float | None = None
    ) -> None:
        """Log a loss of the batch before ``at``; in ``loss.csv``, too, if this worker does.

        In training it comes with the learning rate and the gradients of ``at``.
        """
        last = at.step - 1
        self.log.info(f"[{last}] {kind} loss: {loss}")
        place = self.workers.rank, str(datetime.now()), at.elements_seen, kind, epoch, batch, last
        step: tuple[float, ...] = (-1, -1, -1)
        values = {f"loss/{kind}": loss}
        if lr is not None:
            step = lr, at.avg_grad, at.avg_grad_clipped
            values["learning rate"] = lr
        self._loss.write_row(CSVLossEntry(*place, loss, *step))
        self.loggers.log(kind, values, last)

    def write_timemem(self, kind: ModelMode, **columns: Any) -> None:
        """Append a row to ``timemem.csv``: these columns, and the GPU's memory now."""
        memory = asdict(cuda_memory_snapshot(self.workers.device))
        del memory["unit"]
        self._timemem.write_row(CSVTimeAndMemSnapshotEntry(kind=kind.value, **columns, **memory))

    def add_model(
        self, loss: float, left_out: int, state: dict[str, Any], position: Position
    ) -> None:
        """Offer a model for the best; ``config.yaml`` then tells how to go on from the best.

        Its validation loss leaves so many batches out; the main worker's state dict counts.
        """
        self.best.add(Ranked(left_out, loss), state)
        if position.done:
            self._resume.next_epoch_index = position.epoch
            self._resume.next_batch_index = position.batch
            self._resume.checkpoint_file = str(self.best.best_file() or "")
            self.dump_config()


def new_run_dir(wanted: Path) -> Path:
    """Create a folder for a run: as wanted, or with a number if there is one, of another run."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()  # which of several runs that start at once only one can do
            break
    return folder


def hold_run(folder: Path) -> AbstractContextManager[None]:
    """Keep others from a run while the block runs.

    Raises:
        ValueError: Another process, or another trainer of this one, holds it.
    """
    (folder / "state").mkdir(exist_ok=True)
    return hold(folder / "state" / "lock", f"{folder}: this run is being trained already")


class CsvLog(Generic[Row]):
    """Appends rows to a CSV file, each by one write, so that several workers may share the file.

    A worker for which it is not ``enabled`` writes none.
    """

    def __init__(self, file: Path, columns: type[Row], *, enabled: bool) -> None:
        self.file = file
        self._columns = columns._fields
        self._enabled = enabled

    def begin(self) -> None:
        """Write the header, if there is no file."""
        if not self.file.exists():
            self._append(self._columns)

    def write_row(self, row: Row) -> None:
        """Append a row."""
        if self._enabled:
            self._append(row)

    def cut(self, size: int) -> None:
        """Drop all that follows so many bytes, and a row that is cut then or was by a crash."""
        os.truncate(self.file, self.file.read_bytes().rfind(b"\n", 0, size) + 1)

    def _append(self, row: Iterable[Any]) -> None:
        with naming_file(self.file), self.file.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)


class Ranked(NamedTuple):
    """How good a model is: how many batches its validation loss does not count, and the loss."""

    left_out: int
    loss: float


class BestModels:
    """The best models of a run, on the disk: ``<name>_top<i>.pth``, the best first.

    A run that goes back to a training state keeps those that were found after it if it finds them
    again as it goes on. All workers call this, the main one writes.

    Attributes:
        entries: How good they are, best first. A loss that leaves batches out ranks only while
            there is none that is whole: they cannot be compared. Equal ones count once.
    """

    def __init__(self, run_dir: Path, name: str, count: int, workers: Workers) -> None:
        self._prefix = f"{name}_top"
        self._run_dir = run_dir
        self._count = count
        self._workers = workers
        self._new = run_dir / STATES / "new.pth"
        self.entries: list[Ranked] = []

    def add(self, model: Ranked, state: dict[str, Any]) -> None:
        """Save a model, if it is among the best; one that is found again replaces itself."""
        before, candidates = self.entries, sorted({*self.entries, model})
        entries = [entry for entry in candidates if not entry.left_out] or candidates
        entries = entries[: self._count]
        if model not in entries:
            return
        at = entries.index(model)
        if self._workers.is_main:
            save_model_state(self._new.parent, self._new.name, state, model.loss)
            if model not in before:
                for index in range(len(entries) - 1, at, -1):
                    self._file(index - 1).replace(self._file(index))
            self._new.replace(self._file(at))
            for index in range(len(entries), len(before)):
                self._file(index).unlink()
        self.entries = entries

    def restore(self, told: Iterable[Iterable[Any]], *, keeps_others: bool = True) -> None:
        """Take over those there are, of which `entries` told some when a state was saved.

        The others are set aside as ``<name>_left_<loss>.pth``, unless they are kept.
        """
        found: dict[int, Path] = {}
        if self._workers.is_main:
            for file in self._run_dir.glob(f"{glob.escape(self._prefix)}*.pth"):
                if (number := file.stem.removeprefix(self._prefix)).isdecimal():
                    found[int(number)] = file
        known = {loss: left_out for left_out, loss in told}
        files = [file for _, file in sorted(found.items())]
        losses = [read_checkpoint(file, mmap=True)[1] for file in files]
        if self._workers.is_main:
            self._new.unlink(missing_ok=True)
        entries: list[Ranked] = []
        for file, loss in zip(files, losses, strict=True):
            entry = Ranked(known.get(loss, 0), loss)
            if not (keeps_others or loss in known):  # a user may want it all the same
                file.replace(self._run_dir / f"{self._prefix.removesuffix('top')}left_{loss}.pth")
            # A crash may have left a gap, and a run before may have kept more. Out of order are
            # losses that leave batches out, found after the state: they are found again.
            elif len(entries) < self._count and (not entries or entry > entries[-1]):
                file.replace(self._file(len(entries)))
                entries.append(entry)
            else:
                file.unlink()
        self.entries = self._workers.from_main(entries)

    def best_file(self) -> Path | None:
        """The best model's file, if there is one."""
        return self._file(0) if self.entries else None

    def _file(self, index: int) -> Path:
        return self._run_dir / f"{self._prefix}{index + 1}.pth"
