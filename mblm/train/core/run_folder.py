"""The folder of a run: its configuration, losses, times and memory, and checkpoints.

<output_dir>/<name_model>_<run id>/
    config.yaml             the run's configuration, how to go on from its best model, a summary
    loss.csv, timemem.csv   rows of `CSVLossEntry` and `CSVTimeAndMemSnapshotEntry`
    metrics.csv             rows of `CSVMetricsEntry`
    samples/                what the model wrote at validations, if configured
    train.log               what the main worker tells
    <name_model>_top<i>.pth the best models, best first
    state/                  training states, and the best models that they refer to
    tensorboard/, wandb/    if configured
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

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
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.loggers import Loggers, check_loggers
from mblm.train.core.output import BestModels, CsvLog, Ranked, new_run_dir
from mblm.train.core.parallel import Workers
from mblm.train.core.run import Position
from mblm.train.core.training_state import (
    SavedState,
    prune_states,
    referred_models,
    run_dir_of,
)
from mblm.utils.atomic import atomic_write
from mblm.utils.cuda import cuda_memory_snapshot, cuda_properties
from mblm.utils.io import dump_yml
from mblm.utils.lock import hold

Config = GenericEntryConfig[Any, Any, Any]


class RunFolder:
    """Writes what a run tells. All workers have one; the main worker writes, all may log losses.

    The main worker must hold the folder, see `hold_run`, while anything is written.

    Args:
        config, options, workers, path: The run's.
        log: Is told what goes wrong with loggers.
        resumed: The state that the run goes on from; without it, it begins with empty files.

    Attributes:
        summary, lineage: What ``config.yaml`` says about the run.
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
        io = config.io
        self.path = path
        self._config = config
        self._config_file = path / options.config_file_name
        self._workers = workers
        self.best = BestModels(path, io.name_model, io.num_models_to_save, writes=workers.is_main)
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
            path / options.timemem_file_name, CSVTimeAndMemSnapshotEntry, enabled=workers.is_main
        )
        self._metrics = CsvLog(path / "metrics.csv", CSVMetricsEntry, enabled=workers.is_main)
        names = _logger_names(config, workers)
        self.loggers = Loggers(names, path, io.name_model, config.model_dump(mode="json"), log)
        self.lineage: Lineage | None = None
        self._resume = ResumeConfig(
            checkpoint_file="",
            next_epoch_index=-1,
            next_batch_index=-1,
            resumed_from=config.resume.checkpoint_file if config.resume else None,
        )
        if resumed is not None:
            self._take_over(resumed)
        elif workers.is_main:
            for file in (self._loss, self._timemem, self._metrics):
                file.keep_before()
            self.loggers.rewind(0, [])
        workers.barrier()

    def rewind(self, saved: SavedState) -> None:
        """Go back to a training state: drop what was written after it."""
        if self._workers.is_main:
            position = Position(**saved.own["position"])
            step, validated = position.step, position.step - (position.validates_after is not None)
            self.loggers.rewind(step, [self._loss.last_batches(), self._metrics.last_batches()])
            for log in (self._loss, self._timemem, self._metrics):
                log.keep_before(train=step, valid=validated)
            prune_states(self.path, after=step)
        self.best.restore(saved.manifest["best"])
        self._take_over(saved)
        self._workers.barrier()

    def _take_over(self, saved: SavedState) -> None:
        told = saved.manifest.get("resume", {})  # which older states have not
        self._resume = self._resume.model_copy(update=told)

    def manifest(self) -> dict[str, Any]:
        """What a training state holds of the folder, for `rewind`."""
        return {"best": self.best.entries, "resume": self._resume.model_dump()}

    def dump_config(self) -> None:
        """Write ``config.yaml``."""
        if self._workers.is_main:
            output: GenericOutputConfig[Any, Any, Any] = GenericOutputConfig(
                params=self._config.params,
                train=self._config.train,
                io=self._config.io,
                resume=self._resume,
                summary=self.summary,
                lineage=self.lineage,
            )
            dump_yml(self._config_file, output)

    def write_loss(self, kind: ModelMode, loss: float, source: str = "", **columns: float) -> None:
        """Append a row to ``loss.csv``, if this worker does; columns that are not given are -1.

        The loss on one source of a mixture has the kind ``valid/<source>``.
        """
        name = f"{kind.value}/{source}" if source else kind.value
        told: dict[str, Any] = {"gpu_rank": self._workers.rank, "timestamp": str(datetime.now())}
        told |= {"kind": name, "loss": loss, **columns}
        row = CSVLossEntry(**{**dict.fromkeys(CSVLossEntry._fields, -1), **told})
        self._loss.write_row(row)
        rate = {"learning rate": row.lr} if kind is ModelMode.TRAIN else {}
        self.loggers.log(name, {f"loss/{name}": loss, **rate}, row.cum_batch)

    def write_metrics(self, row: CSVMetricsEntry, values: Mapping[str, float]) -> None:
        """Append a row to ``metrics.csv``, and log values by the names that people read."""
        self.loggers.log(row.kind, values, row.cum_batch)
        self._metrics.write_row(row)

    def write_samples(self, step: int, prompts: Sequence[str], texts: Sequence[bytes]) -> None:
        """Write what the model writes after prompts to ``samples/step_<n>.txt``, and log it."""
        told = [
            f"{prompt}{text.decode(errors='replace')}"
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        (self.path / "samples").mkdir(exist_ok=True)
        with atomic_write(self.path / "samples" / f"step_{step:08d}.txt") as file:
            file.write("\n\n---\n\n".join([*told, ""]).encode())
        for number, text in enumerate(told, start=1):
            self.loggers.log_text(f"sample {number}", text, step - 1)

    def write_timemem(self, kind: ModelMode, **columns: Any) -> None:
        """Append a row to ``timemem.csv``: these columns, and the GPU's memory now."""
        memory = asdict(cuda_memory_snapshot(self._workers.device))
        del memory["unit"]
        self._timemem.write_row(CSVTimeAndMemSnapshotEntry(kind=kind.value, **columns, **memory))

    def add_model(
        self, loss: float, left_out: int, state: dict[str, Any], position: Position
    ) -> None:
        """Offer a model for the best; ``config.yaml`` then tells how to go on from the best.

        Its validation loss leaves so many batches out; the main worker's state dict counts.
        """
        name = f"step_{position.step:08d}.pth" if position.done else "resumed.pth"
        self.best.add(Ranked(loss, name, left_out), state)
        if position.done:
            self._resume.next_epoch_index = position.epoch
            self._resume.next_batch_index = position.batch
            self._resume.checkpoint_file = str(self.best.best_file() or "")
            self.dump_config()

    def clean_up(self) -> None:
        """Remove old training states, and models that nothing refers to."""
        if self._workers.is_main:
            self.best.prune(referred_models(prune_states(self.path)))


def make_run_dir(config: Config, workers: Workers, run_id: str, state_dir: Path | None) -> Path:
    """The folder of a run on every worker; a new one but for a run that goes on.

    Making one comes last: everything else must have been checked before. A new one is called by
    the model's name and the main worker's ``run_id``; ``state_dir`` is in that of a run.
    """
    check_loggers(_logger_names(config, workers))
    path = Path()
    if state_dir is not None:
        path = run_dir_of(state_dir)
    elif workers.is_main:
        path = new_run_dir(Path(config.io.output_dir, f"{config.io.name_model}_{run_id}"))
    path = Path(workers.from_main(str(path)))
    path.mkdir(parents=True, exist_ok=True)  # a node may have a disk of its own
    return path


def _logger_names(config: Config, workers: Workers) -> list[str]:
    names = ["tensorboard"] * config.io.tensorboard + config.io.loggers
    return list(dict.fromkeys(names)) if workers.is_main else []


def hold_run(folder: Path) -> AbstractContextManager[None]:
    """Keep others from a run while the block runs.

    Raises:
        ValueError: Another process, or another trainer of this one, holds it.
    """
    (folder / "state").mkdir(exist_ok=True)
    return hold(folder / "state" / "lock", f"{folder}: this run is being trained already")
