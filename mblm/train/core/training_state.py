"""Save all that a run needs to go on exactly, and load it.

A training state is a folder ``<run>/state/step_<n>``, n being the batches trained on:

    common.pt      what all workers share: schedule, scaler, seed, the best models' losses, and the
                   weights and the optimizer's state if every worker holds them
    rank_<r>.pt    what is one worker's: position, random numbers, pending gradients, its shard
    COMPLETE       JSON: format, workers, strategy, and the best models' losses and files

It is written as ``.step_<n>.tmp`` and renamed when all files are on the disk, so that a folder with
that name is whole. All workers must see the same folder. Nothing but tensors and plain values is
unpickled when it is read.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mblm.train.core.config import ResumeConfig
from mblm.train.core.parallel import Workers
from mblm.utils.atomic import atomic_write, sync_directory

FORMAT = 1
KEPT = 2
_STATES = "state"
_PREFIX = "step_"
_MANIFEST = "COMPLETE"

State = dict[str, Any]


def find_latest_state(run_dir: str | Path) -> Path | None:
    """The latest whole training state of a run folder, or None."""
    states = list_states(run_dir)
    return states[-1] if states else None


def list_states(run_dir: str | Path) -> list[Path]:
    """The whole training states of a run folder, the earliest first."""
    folders = Path(run_dir, _STATES).glob(f"{_PREFIX}*")
    return sorted((f for f in folders if is_training_state(f)), key=step_of)


def is_training_state(path: str | Path) -> bool:
    """Whether a path is the folder of a training state."""
    return Path(path, _MANIFEST).is_file()


def state_to_resume(resume: ResumeConfig | None) -> Path | None:
    """The training state that a configuration goes on from; None for a checkpoint or nothing.

    Raises:
        ValueError: There is neither a training state nor a file.
    """
    if resume is None:
        return None
    path = Path(resume.checkpoint_file)
    if is_training_state(path):
        return path
    if path.is_file():
        return None
    raise ValueError(
        f"resume.checkpoint_file: {path} is neither a checkpoint nor the folder of a whole "
        "training state"
    )


def run_dir_of(state_dir: Path) -> Path:
    """The run folder that a training state is of."""
    return state_dir.resolve().parents[1]


def state_dir_at(run_dir: Path, step: int) -> Path:
    """The folder of a run's state after ``step`` batches."""
    return run_dir / _STATES / f"{_PREFIX}{step:08d}"


def save_training_state(
    run_dir: Path, step: int, common: State, own: State, workers: Workers, strategy: str
) -> None:
    """Save a state; called by all workers.

    Args:
        run_dir: The run folder.
        step: Batches trained on.
        common: What all share, ``best`` with it: loss, file and more; the main worker's counts.
        own: What is this worker's.
        workers: The workers.
        strategy: How they share the model.

    Raises:
        OSError: The state cannot be written; the states before are as they were.
    """
    final = state_dir_at(run_dir, step)
    if workers.from_main(is_training_state(final)):
        return
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _write(temporary / f"rank_{workers.rank}.pt", own)
        if workers.is_main:
            _write(temporary / "common.pt", common)
        workers.barrier()
        if workers.is_main:
            manifest = {
                "format": FORMAT,
                "workers": workers.world_size,
                "strategy": strategy,
                "best": common["best"],
            }
            with atomic_write(temporary / _MANIFEST) as file:
                file.write(json.dumps(manifest).encode())
            os.rename(temporary, final)
            sync_directory(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        latest = find_latest_state(run_dir)
        kept = f"the last good state is {latest}" if latest else "there is no earlier state"
        raise OSError(
            error.errno,
            f"cannot save the training state: {error.strerror or error}; {kept}",
            str(final),
        ) from error
    workers.barrier()


def referred_models(states: list[Path]) -> list[str]:
    """Names of the best models' files that states refer to."""
    manifests = [json.loads((state / _MANIFEST).read_bytes()) for state in states]
    return [model[1] for manifest in manifests for model in manifest["best"]]


def prune_states(run_dir: Path, *, after: int | None = None) -> list[Path]:
    """Remove all but the latest states, those after a step, and what a crash left; called by one.

    Returns:
        The states that are kept.
    """
    folder = Path(run_dir, _STATES)
    kept = [s for s in list_states(run_dir) if after is None or step_of(s) <= after][-KEPT:]
    for state in [*folder.glob(f"{_PREFIX}*"), *folder.glob(f".{_PREFIX}*.tmp")]:
        if state not in kept:
            (state / _MANIFEST).unlink(missing_ok=True)  # first: it must not look whole
            shutil.rmtree(state, ignore_errors=True)
    return kept


def load_training_state(state_dir: Path, workers: Workers, strategy: str) -> tuple[State, State]:
    """Load what all share and what is this worker's, to the CPU.

    Raises:
        ValueError: No whole state of this format, one of another number of workers or strategy,
            or a damaged file.
    """
    try:
        manifest = json.loads((state_dir / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{state_dir} is not a whole training state: {error}") from error
    expected = {"format": FORMAT, "workers": workers.world_size, "strategy": strategy}
    for field, value in expected.items():
        if manifest.get(field) != value:
            raise ValueError(
                f"{state_dir} was saved with {field} {manifest.get(field)}, this run has {value}. "
                f"Resume with the same {field}, or from a checkpoint .pth, the weights only"
            )
    return _read(state_dir / "common.pt"), _read(state_dir / f"rank_{workers.rank}.pt")


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested plain containers with the function applied to the tensors in them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def step_of(state_dir: Path) -> int:
    """The batches that a state's run had trained on."""
    try:
        return int(state_dir.name.removeprefix(_PREFIX))
    except ValueError:
        return -1


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        torch.save(content, file)


def _read(path: Path) -> State:
    try:
        content: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(f"{path} cannot be read as a training state: {reason}") from error
    return content
