"""Save all that a run needs to go on exactly, and load it.

A training state is a folder ``<run>/state/step_<n>``, n being the batches trained on:

    common.pt      what all workers share: scaler, seed, and the weights and the optimizer's state
                   if every worker holds them
    rank_<r>.pt    what is one worker's: position, random numbers, pending gradients, its shard
    COMPLETE       JSON: format, workers, strategy, what the run depends on, and what `RunFolder`
                   has to tell

It is written as ``.step_<n>.tmp`` and renamed when all files are on the disk, so that a folder with
that name is whole. All workers must see the same folder. Nothing but tensors and plain values is
unpickled when it is read.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mblm.train.core.config import ResumeConfig
from mblm.train.core.parallel import Workers, to_local
from mblm.utils.atomic import atomic_write, sync_directory
from mblm.utils.checkpoint import load_tensors, save_tensors

FORMAT = 3
KEPT = 2
STATES = "state"
_PREFIX = "step_"
_MANIFEST = "COMPLETE"
_SCALARS = (bool, int, float, complex, str, torch.dtype)

State = dict[str, Any]


@dataclass(frozen=True)
class SavedState:
    """A training state that was loaded to the CPU.

    What is this worker's ``own`` is the main one's in a state of another number of workers, which
    do not go on with the same bits: ``is_exact`` is False.
    """

    path: Path
    manifest: State
    common: State
    own: State
    is_exact: bool = True


def find_latest_state(run_dir: str | Path) -> Path | None:
    """The latest whole training state of a run folder, or None."""
    states = list_states(run_dir)
    return states[-1] if states else None


def list_states(run_dir: str | Path) -> list[Path]:
    """The whole training states of a run folder, the earliest first."""
    return sorted(filter(is_training_state, _state_dirs(run_dir)), key=step_of)


def _state_dirs(run_dir: str | Path) -> list[Path]:
    found = Path(run_dir, STATES).glob(f"{_PREFIX}*")
    return [path for path in found if path.name.removeprefix(_PREFIX).isdecimal()]


def is_training_state(path: str | Path) -> bool:
    """Whether a path is the folder of a training state."""
    return Path(path, _MANIFEST).is_file()


def state_to_resume(resume: ResumeConfig | None) -> Path | None:
    """The training state that a configuration goes on from; None for a checkpoint or nothing."""
    if resume is None:
        return None
    path = Path(os.path.abspath(resume.checkpoint_file))
    if path in list_states(run_dir_of(path)):
        return path
    if path.is_file():
        return None
    raise ValueError(
        f"resume.checkpoint_file: {resume.checkpoint_file} is neither a checkpoint nor the folder "
        "of a whole training state, <run>/state/step_<n>"
    )


def run_dir_of(state_dir: Path) -> Path:
    """The folder of the run that a training state is of."""
    return state_dir.absolute().parent.parent


def state_dir_at(run_dir: Path, step: int) -> Path:
    """The folder of a run's state after ``step`` batches."""
    return run_dir / STATES / f"{_PREFIX}{step:08d}"


def step_of(state_dir: Path) -> int:
    """The batches that a state's run had trained on."""
    return int(state_dir.name.removeprefix(_PREFIX))


def save_training_state(
    run_dir: Path,
    step: int,
    manifest: State,
    common: State,
    own: State,
    workers: Workers,
) -> None:
    """Save a state, unless there is one of this step; called by all workers.

    Of manifest (plain values) and of what is common to all, those of the main worker count.

    Raises:
        OSError: On all workers: the state cannot be written; the states before are as they were.
        TypeError: The state holds something that could not be loaded again.
    """
    common, own = _plain(common, "common"), _plain(own, f"rank {workers.rank}")
    final = state_dir_at(run_dir, step)
    if workers.from_main(is_training_state(final)):
        return
    temporary = final.with_name(f".{final.name}.tmp")

    def write() -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        save_tensors(temporary / f"rank_{workers.rank}.pt", own)
        if workers.is_main:
            save_tensors(temporary / "common.pt", common)

    def complete() -> None:
        if workers.is_main:
            told = {"format": FORMAT, "workers": workers.world_size, **manifest}
            with atomic_write(temporary / _MANIFEST) as file:
                file.write(json.dumps(told).encode())
            if final.exists():  # a part of one, such as a file that another has open on NFS
                final.rename(final.with_name(f".{final.name}.{os.urandom(4).hex()}.tmp"))
            os.rename(temporary, final)
            sync_directory(final.parent)

    for part in (write, complete):
        if error := _first_error(part, workers):
            if workers.is_main:  # when nobody writes into it any more
                shutil.rmtree(temporary, ignore_errors=True)
            latest = find_latest_state(run_dir)
            kept = f"the last good state is {latest}" if latest else "there is no earlier state"
            raise OSError(
                error.errno,
                f"cannot save the training state: {error.strerror or error}; {kept}",
                str(final),
            ) from error


def _first_error(part: Callable[[], None], workers: Workers) -> OSError | None:
    """Do something on all workers and wait for them; the first error of any of them."""
    error = None
    try:
        part()
    except OSError as failed:
        error = OSError(failed.errno, failed.strerror or str(failed))
    return next((failed for failed in workers.gather(error) if failed is not None), None)


def prune_states(run_dir: Path, *, after: int | None = None) -> None:
    """Remove all but the latest states, those after a step, and what a crash left."""
    latest = [s for s in list_states(run_dir) if after is None or step_of(s) <= after][-KEPT:]
    for state in [*_state_dirs(run_dir), *Path(run_dir, STATES).glob(f".{_PREFIX}*.tmp")]:
        if state not in latest:
            with suppress(OSError):
                (state / _MANIFEST).unlink(missing_ok=True)  # first: it must not look whole
                shutil.rmtree(state, ignore_errors=True)


def read_manifest(state_dir: Path) -> State:
    """What a state says of itself: ``facts``, what its run depends on, among other things."""
    try:
        manifest: State = json.loads((state_dir / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{state_dir} is not a whole training state: {error}") from error
    return manifest


def load_training_state(state_dir: Path, workers: Workers, strategy: str) -> SavedState:
    """Load a state, what all share and what is this worker's; nothing is changed.

    Raises:
        ValueError: It does not fit or is damaged.
    """
    manifest = read_manifest(state_dir)
    is_exact = manifest.get("workers") == workers.world_size
    expected = {"format": FORMAT, "strategy": strategy}
    if strategy == "fsdp":  # the shards of so many workers are not made those of others
        expected["workers"] = workers.world_size
    for field, value in expected.items():
        if manifest.get(field) != value:
            raise ValueError(
                f"{state_dir} was saved with {field} {manifest.get(field)}, this run has {value}. "
                f"Resume with the same {field}, or from a checkpoint .pth, the weights only"
            )
    shared, own = state_dir / "common.pt", state_dir / f"rank_{workers.rank * is_exact}.pt"
    common, mine = (load_tensors(file, "a training state") for file in (shared, own))
    return SavedState(state_dir, manifest, common, mine, is_exact)


def _plain(value: Any, name: str) -> Any:
    """The value with tensors as this worker has them and numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key, name): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_plain(item, f"{name}.{index}") for index, item in enumerate(value))
    if isinstance(value, torch.Tensor):
        return to_local(value)
    if value is None or type(value) in _SCALARS:
        return value
    raise TypeError(
        f"{name}: expected a tensor or a plain value, got {type(value).__name__}, which could not "
        "be loaded again from a training state"
    )
