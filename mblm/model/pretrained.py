"""Save and load whole models: a folder with the configuration and safetensors, or the hub."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from mblm.utils.atomic import atomic_write
from mblm.utils.checkpoint import load_checked_state, load_model_state

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RUN_CONFIG_FILE = "config.yaml"

Model = TypeVar("Model", bound="PretrainedMixin")


class PretrainedMixin:
    """``save_pretrained`` and ``from_pretrained`` for a module built from one configuration.

    A subclass names the class of its configuration in ``config_class`` and keeps the one it was
    built from in ``pretrained_config``.
    """

    config_class: ClassVar[type[BaseModel]]
    pretrained_config: BaseModel

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``; each is replaced as a whole.

        Args:
            save_directory: The folder, created if missing.
        """
        from safetensors.torch import save

        assert isinstance(self, torch.nn.Module)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "model_type": type(self).__name__,
            **self.pretrained_config.model_dump(mode="json"),
        }
        weights = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        with atomic_write(folder / WEIGHTS_FILE) as file:
            file.write(save(weights, {"format": "pt"}))
        with atomic_write(folder / CONFIG_FILE) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Model:
        """Build a model from what ``save_pretrained`` wrote; it is in evaluation mode.

        Args:
            pretrained_model_name_or_path: A folder, or the id of a model on the hub, for which
                ``pip install "mblm[hub]"`` is needed.
            revision: Branch, tag or commit on the hub. Default: the main branch.
            map_location: The device of the weights. Default: the CPU.

        Raises:
            FileNotFoundError: There is no such folder, or it lacks one of the two files.
            ValueError: The configuration is not one of this class, the weights file is damaged,
                does not fit the configuration or holds NaN; the message names the file.
        """
        folder = _find_folder(pretrained_model_name_or_path, revision)
        config = _read_config(folder / CONFIG_FILE, cls)
        weights = _read_weights(folder / WEIGHTS_FILE, map_location)
        model: Any = cls(config).to(map_location)  # type: ignore[call-arg,attr-defined]
        load_checked_state(folder / WEIGHTS_FILE, weights, model)
        return model.eval()


class _RunConfig(BaseModel):
    """What a training run's configuration says about its model, among much else."""

    params: dict[str, Any]


def load_checkpoint(
    model_class: type[Model],
    checkpoint: str | os.PathLike[str],
    *,
    config_file: str | os.PathLike[str] | None = None,
    map_location: str | torch.device = "cpu",
) -> Model:
    """Build a model from a folder or hub id, as ``from_pretrained``, or from a run's ``.pth`` file.

    Args:
        model_class: The class of the model.
        checkpoint: A folder, a hub id, or a file that `save_model_state` or a training run wrote.
        config_file: Configuration of the run that wrote the ``.pth`` file, whose ``params`` are
            those of the model. Default: ``config.yaml`` beside it.
        map_location: The device of the weights. Default: the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such checkpoint or configuration.
        ValueError: One of them is damaged, or they do not fit; the message names the file.
    """
    from mblm.utils.io import load_yml  # brings PyYAML, for this alone

    file = Path(checkpoint)
    if file.suffix != ".pth" or file.is_dir():
        if config_file is not None:
            raise ValueError(f"config_file: {file} is no .pth file and has its own configuration")
        return model_class.from_pretrained(checkpoint, map_location=map_location)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    config_file = Path(config_file or file.with_name(RUN_CONFIG_FILE))
    params = load_yml(config_file, _RunConfig).params
    params.pop("input_seq_len", None)  # the length of training sequences, not the model's
    try:
        config = model_class.config_class.model_validate(params)
    except ValidationError as error:
        raise ValueError(f"{config_file}, params: {error}") from error
    model: Any = model_class(config).to(map_location)  # type: ignore[call-arg,attr-defined]
    return load_model_state(file, model, map_location)[0].eval()


def _find_folder(name: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a model, downloaded from the hub where ``name`` is no folder."""
    folder = Path(name)
    if folder.is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {file}; was it made by save_pretrained?"
                )
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2:
        raise FileNotFoundError(f"{name} is neither a folder nor a model id like owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is no folder; to look for it on the hub: pip install 'mblm[hub]'"
        ) from error
    files = [CONFIG_FILE, WEIGHTS_FILE]
    return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))


def _read_config(file: Path, cls: type[PretrainedMixin]) -> BaseModel:
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(data, dict) or data.pop("model_type", None) != cls.__name__:
        raise ValueError(f"{file}: not the configuration of a {cls.__name__}")
    try:
        return cls.config_class.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_weights(file: Path, map_location: str | torch.device) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device=str(map_location))
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
