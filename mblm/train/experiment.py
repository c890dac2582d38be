"""An experiment: its YAML file, settings that replace fields of it, and what it resumes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import RootModel, ValidationError

from mblm.utils.io import load_yml

if TYPE_CHECKING:
    from mblm.train.mblm import TrainEntryConfig, TrainMaskedEntryConfig


class _Fields(RootModel[dict[str, Any]]):
    """The fields of a YAML file, not looked at."""


def load_experiment(
    file: Path, settings: Sequence[str] = (), resume: str | None = None
) -> "TrainEntryConfig | TrainMaskedEntryConfig":
    """Read an experiment.

    Args:
        file: The YAML file; one with ``params.mblm_config`` trains an encoder.
        settings: Fields to replace, such as ``train.batch_size=4``; see `apply_setting`.
        resume: What to resume from, as in `find_resume`. Default: what the file says.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The file or a setting is not valid, or there is nothing to resume from.
    """
    from mblm.train.mblm import TrainEntryConfig, TrainMaskedEntryConfig

    fields = load_yml(file, _Fields).root
    for setting in settings:
        apply_setting(fields, setting)
    is_masked = "mblm_config" in (fields.get("params") or {})
    entry = TrainMaskedEntryConfig if is_masked else TrainEntryConfig
    try:
        config = entry.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{file}: {error}") from error
    if resume is not None:
        config = config.model_copy(update={"resume": find_resume(config, resume)})
    return config


def train_experiment(config: "TrainEntryConfig | TrainMaskedEntryConfig") -> None:
    """Train what the configuration describes, a decoder or an encoder."""
    from mblm.train.mblm import TrainMaskedEntryConfig, train_encoder_mblm, train_mblm

    if isinstance(config, TrainMaskedEntryConfig):
        train_encoder_mblm(config)
    else:
        train_mblm(config)


def apply_setting(fields: dict[str, Any], setting: str) -> None:
    """Replace one field, ``path=value``.

    Args:
        fields: The fields of an experiment, changed in place.
        setting: A dotted path, in which a number is the index of a list's item, and a value in
            YAML. ``1e-3`` is a number too, other than in YAML.

    Raises:
        ValueError: No path or no value, or the path leads through what has no fields.
    """
    path, equals, text = setting.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise ValueError(f"--set: expected path=value, such as train.batch_size=4, got {setting!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path}: {text!r} is no YAML value") from error
    at: Any = fields
    for depth, name in enumerate(names):
        if isinstance(at, dict):
            key: Any = name
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            key = int(name)
        else:
            raise ValueError(f"--set {path}: {'.'.join(names[:depth])} has no field {name}")
        if depth + 1 == len(names):
            at[key] = _number_of(value)
        elif isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
        at = at[key]


def _number_of(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def find_resume(config: "TrainEntryConfig | TrainMaskedEntryConfig", resume: str) -> Any:
    raise NotImplementedError
