"""An experiment: its YAML file, settings that replace fields of it, and what it resumes from."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mblm.model.find import RUN_CONFIG_FILE
from mblm.train.core.training_state import find_latest_state, is_training_state, read_manifest
from mblm.train.mblm import (
    TrainEntryConfig,
    TrainMaskedEntryConfig,
    dataset_registry,
    masked_dataset_registry,
)
from mblm.utils.errors import with_title
from mblm.utils.io import load_fields, parse_yml


def load_experiment(
    file: Path, settings: Sequence[str] = (), resume: str | None = None
) -> TrainEntryConfig | TrainMaskedEntryConfig:
    """Read an experiment.

    Args:
        file: The YAML file; one with ``params.mblm_config`` trains an encoder.
        settings: Fields to replace, such as ``train.batch_size=4``; see `apply_setting`.
        resume: What to resume from, as in `find_resume`. Default: what the file says.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The file or a setting is not valid, or there is nothing to resume from.
    """
    fields = load_fields(file)
    for setting in settings:
        apply_setting(fields, setting)
    params, said = fields.get("params"), fields.get("resume") or {}
    is_masked = isinstance(params, dict) and "mblm_config" in params
    entry = TrainMaskedEntryConfig if is_masked else TrainEntryConfig
    if resume is not None and isinstance(said, dict):  # anything else is refused below
        fields["resume"] = {**said, "checkpoint_file": resume}
    try:
        config = entry.model_validate(fields)
    except ValidationError as error:
        raise with_title(error, str(file)) from None
    try:
        (masked_dataset_registry if is_masked else dataset_registry).retrieve(config.io.dataset_id)
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]}") from None
    if resume is not None:
        assert config.resume is not None
        found = find_resume(resume, Path(config.io.output_dir), config.io.name_model)
        if not found:
            return load_experiment(file, settings)
        config.resume = config.resume.model_copy(update=found)
    return config


def apply_setting(fields: dict[str, Any], setting: str) -> None:
    """Replace one field, ``path=value``.

    Args:
        fields: The fields of an experiment, changed in place.
        setting: A dotted path, in which a number is the index of a list's item, and a value in
            YAML.

    Raises:
        ValueError: No path or no value, or the path leads through what has no fields.
    """
    path, equals, text = setting.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise ValueError(f"--set: expected path=value, such as train.batch_size=4, got {setting!r}")
    value = parse_yml(text, f"--set {path}")
    at: Any = fields
    for depth, name in enumerate(names):
        if isinstance(at, dict):
            key: Any = name
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            key = int(name)
        else:
            raise ValueError(f"--set {path}: {'.'.join(names[:depth])} has no field {name}")
        if depth + 1 == len(names):
            at[key] = value
        elif isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
        at = at[key]


def find_resume(resume: str, output_dir: Path, name_model: str) -> dict[str, Any]:
    """Fields of a `ResumeConfig`, from what a user says to resume from.

    Args:
        resume: ``"latest"``, the newest training state of the runs of that name; ``"auto"``, the
            same if there is one; a run's folder or its ``config.yaml``, its newest training state
            or, where it has none, the weights and the place in the data that its configuration
            names; a training state; or a ``.pth`` file, whose weights start anew.
        output_dir: The folder of the runs.
        name_model: The name of the model of these runs.

    Returns:
        The fields; none for ``"auto"`` if there is nothing to go on from.

    Raises:
        FileNotFoundError: There is no such thing.
        ValueError: There is nothing to resume from in it.
    """
    if resume in ("latest", "auto"):
        runs = output_dir.glob(f"{glob.escape(name_model)}_*")  # of longer names, too
        latest = [state for run in runs if (state := find_latest_state(run)) is not None]
        states = [state for state in latest if _name_of(state) == name_model]
        if not states and resume == "auto":
            return {}
        if not states:
            raise ValueError(
                f"resume: no run of {name_model!r} in {str(output_dir)!r} with a training state"
            )
        return {"checkpoint_file": str(max(states, key=lambda state: state.stat().st_mtime_ns))}
    path = Path(resume)
    if not path.exists():
        raise FileNotFoundError(f"resume: no file or folder {resume}")
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return {"checkpoint_file": resume}
    run = path if path.is_dir() else path.parent
    if is_training_state(run):
        return {"checkpoint_file": resume}
    if (state := find_latest_state(run)) is not None:
        return {"checkpoint_file": str(state)}
    said = load_fields(run / RUN_CONFIG_FILE if path.is_dir() else path).get("resume")
    if not isinstance(said, dict) or not said.get("checkpoint_file"):
        raise ValueError(f"resume: {resume} has neither a training state nor a checkpoint")
    names = ("checkpoint_file", "next_epoch_index", "next_batch_index")
    return {name: said[name] for name in names if name in said}


def _name_of(state: Path) -> str | None:
    try:
        name: str = read_manifest(state)["facts"]["io.name_model"]
    except (ValueError, LookupError, TypeError):
        return None  # of an older format, or damaged
    return name
