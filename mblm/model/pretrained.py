"""Save and load whole models: a folder with the configuration and safetensors, or the hub."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from mblm.model.find import (
    CONFIG_FILE,
    INDEX_FILE,
    RUN_CONFIG_FILE,
    WEIGHTS_FILE,
    as_path,
    find_model,
)
from mblm.model.hub import download_folder, model_card, push_folder
from mblm.utils.atomic import atomic_write
from mblm.utils.checkpoint import (
    load_checked_state,
    load_model_state,
    read_safetensors,
    uncompiled,
)
from mblm.utils.cuda import check_device
from mblm.utils.errors import with_title

# The same in both files of a folder, which tells that they belong together.
_CONFIG_ID = "config_id"
_WRAPPED = "model."  # what the names of `mblm.hf.MBLMForCausalLM` begin with

Model = TypeVar("Model", bound="PretrainedMixin")


class PretrainedMixin:
    """``save_pretrained`` and ``from_pretrained`` for a module built from one configuration.

    A subclass names the class of its configuration in ``config_class`` and keeps the one it was
    built from in ``pretrained_config``.
    """

    config_class: ClassVar[type[BaseModel]]
    pretrained_config: BaseModel

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, with the weights in their dtypes.

        Each file is replaced as a whole, after both were written. A save that ends between the two
        leaves a folder that loads as the new model where its configuration is that of the old one,
        and is refused otherwise. Weights have the names that they have without ``torch.compile``;
        tied weights are written under each of their names.

        Args:
            save_directory: The folder, created if missing.

        Raises:
            TypeError: A weight is no plain tensor, such as a quantized one.
            OSError: The folder cannot be written.
        """
        from safetensors.torch import save

        assert isinstance(self, torch.nn.Module)
        weights = _separate(uncompiled(self.state_dict()))
        folder = as_path(save_directory, "save_directory")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": _model_type(type(self))}
        config |= self.pretrained_config.model_dump(mode="json")
        config[_CONFIG_ID] = _config_id(config)
        metadata = {"format": "pt", _CONFIG_ID: config[_CONFIG_ID]}
        with atomic_write(folder / CONFIG_FILE) as config_file:
            config_file.write((json.dumps(config, indent=2) + "\n").encode())
            with atomic_write(folder / WEIGHTS_FILE) as weights_file:
                weights_file.write(save(weights, metadata))

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        map_location: str | torch.device | None = "cpu",
        dtype: torch.dtype | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Model:
        """Build a model from what ``save_pretrained`` or a training run wrote, in evaluation mode.

        What was saved from a subclass can be loaded as its base class and the other way round, as
        long as they have the same weights.

        Args:
            pretrained_model_name_or_path: A folder; a run's folder, its ``.pth`` file or ``latest``
                (see `mblm.model.find.find_model`); ``python`` or another model that comes with this
                package; or the id of a model on the hub, for which ``pip install "mblm[hub]"`` is
                needed. The first of these that there is counts.
            revision: Branch, tag or commit on the hub. Default: the main branch.
            map_location: The device of the weights, all on one (``device_map`` of transformers);
                ``"meta"`` gives a model without values. Default: the CPU.
            dtype: The dtype of the weights. Default: each has the one that it was saved in.
            token, cache_dir, force_download, local_files_only: How a model comes from the hub,
                as `huggingface_hub` has them. What there is here is not asked for there.

        Raises:
            TypeError: A name or a dtype that is none.
            FileNotFoundError: There is no such folder, it lacks one of the two files, or the hub
                cannot be asked for them.
            ValueError: The device does not work. Or the configuration is not one of this class,
                the weights file is damaged, does not fit the configuration, belongs to another one
                or holds NaN; the message names the file.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating point torch.dtype or None, got {dtype!r}")
        device = check_device("map_location", map_location)
        found = find_model(pretrained_model_name_or_path)
        if _is_checkpoint(found):
            checkpoint: Any = load_checkpoint(cls, found, map_location=device)
            return checkpoint.to(dtype=dtype)
        folder = _find_folder(
            found,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config, config_id = _read_config(folder / CONFIG_FILE, cls)
        file = _weights_file(folder)
        weights = _read_weights(file, config_id)
        model: Any = cls(config)  # type: ignore[call-arg]
        for name, tensor in model.state_dict(keep_vars=True).items():
            saved = weights.get(name, tensor)
            if tensor.is_floating_point() and saved.is_floating_point():
                tensor.data = tensor.data.to(saved.dtype)
        load_checked_state(file, weights, model)
        return model.to(device, dtype).eval()

    def push_to_hub(
        self, repo_id: str, *, bits_per_byte: float | None = None, **options: Any
    ) -> str:
        """Upload what `save_pretrained` writes, with a card, for which the extra ``hub`` is needed.

        Args:
            repo_id: The repository, ``owner/name``; created if missing. A card that is there stays.
            bits_per_byte: What the model needs of a byte, for the card. Default: not known.
            **options: ``private``, ``token``, ``revision``, ``commit_message`` and ``create_pr``,
                as `huggingface_hub` has them.

        Returns:
            The address of the commit.
        """
        name = _model_type(type(self))
        usage = [f"from mblm import {name}", "", f'model = {name}.from_pretrained("{repo_id}")']
        card = model_card(self, library="mblm", usage=usage, bits_per_byte=bits_per_byte)
        return push_folder(repo_id, self.save_pretrained, card, **options)


class _RunConfig(BaseModel):
    """What a training run's configuration says about its model, among much else."""

    params: dict[str, Any]


def load_checkpoint(
    model_class: type[Model],
    checkpoint: str | os.PathLike[str],
    *,
    config_file: str | os.PathLike[str] | None = None,
    map_location: str | torch.device | None = "cpu",
) -> Model:
    """Build a model as ``from_pretrained``, where a ``.pth`` file may lack its configuration.

    Args:
        model_class: The class of the model.
        checkpoint: What ``from_pretrained`` takes.
        config_file: Configuration of the run that wrote the ``.pth`` file, whose ``params`` are
            those of the model. Default: ``config.yaml`` beside it.
        map_location: The device of the weights. Default: the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such checkpoint or configuration.
        ValueError: The device does not work. Or one of the files is damaged, or they do not fit;
            the message names the file.
    """
    from mblm.utils.io import load_yml  # brings PyYAML, for this alone

    device = check_device("map_location", map_location)
    file = find_model(checkpoint)
    if not _is_checkpoint(file):
        if config_file is not None:
            raise ValueError(f"config_file: {file} is no .pth file and has its own configuration")
        return model_class.from_pretrained(file, map_location=device)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    config_file = Path(config_file or file.with_name(RUN_CONFIG_FILE))
    if not config_file.exists():
        raise FileNotFoundError(f"{file}: no {config_file}, which says what model it is")
    params = load_yml(config_file, _RunConfig).params
    params.pop("input_seq_len", None)  # the length of training sequences, not the model's
    try:
        config = model_class.config_class.model_validate(params)
    except ValidationError as error:
        raise with_title(error, f"{config_file}, params") from None
    model: Any = model_class(config)  # type: ignore[call-arg]
    return load_model_state(file, model, "cpu")[0].to(device).eval()


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".pth" and not path.is_dir()


def _find_folder(folder: Path, **download: Any) -> Path:
    """The local folder of a model, downloaded from the hub where there is none of that name."""
    if not folder.is_dir():
        folder = download_folder(folder, **download)
    for file in (folder / CONFIG_FILE, _weights_file(folder)):
        if not file.is_file():  # without a network, a download is what was kept of earlier ones
            raise FileNotFoundError(
                f"{folder} holds no {file.name}; was it made by save_pretrained, all of it?"
            )
    return folder


def _model_type(cls: type[PretrainedMixin]) -> str:
    """The name of the class whose configuration this is, which a subclass shares."""
    return next(base.__name__ for base in cls.__mro__ if "config_class" in vars(base))


def _config_id(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, no two of which share memory, as the format wants them."""
    for name, tensor in state.items():
        if type(tensor) is not Tensor or tensor.is_meta or tensor.is_quantized:
            raise TypeError(
                f"weights: {name} is {_kind(tensor)}, of which a folder cannot hold the values; "
                "save the model before it is quantized, or by torch.save"
            )
    return untied({name: tensor.contiguous() for name, tensor in state.items()})


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with copies of plain tensors that share memory with one before them."""
    seen: set[int] = set()
    separate = dict(state)
    for name, tensor in state.items():
        if type(tensor) is Tensor:
            storage = tensor.untyped_storage().data_ptr()
            if storage in seen:
                separate[name] = tensor.clone()
            seen.add(storage)
    return separate


def _kind(value: object) -> str:
    is_meta = isinstance(value, Tensor) and value.is_meta
    return "without values (meta)" if is_meta else f"a {type(value).__name__}"


def _read_config(file: Path, cls: type[PretrainedMixin]) -> tuple[BaseModel, str]:
    """The configuration, and the id that weights saved with it bear."""
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from error
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if model_type not in (_model_type(cls), cls.__name__):
        raise ValueError(f"{file}: not the configuration of a {cls.__name__}")
    config_id = data.pop(_CONFIG_ID, None) or _config_id(data)  # older ones lack it
    del data["model_type"]
    if "transformers_version" in data:  # which adds settings of its own
        data = {name: data[name] for name in cls.config_class.model_fields if name in data}
    try:
        return cls.config_class.model_validate(data), config_id
    except ValidationError as error:
        raise with_title(error, str(file)) from None


def _weights_file(folder: Path) -> Path:
    """The file of all weights or else, of a folder that has several, their index."""
    file, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    return index if index.is_file() and not file.is_file() else file


def _read_weights(file: Path, config_id: str) -> dict[str, Tensor]:
    if file.name == INDEX_FILE:
        found: dict[str, Tensor] = {}
        for part in _files_of(file):
            more = _read_weights(part, config_id)
            if twice := found.keys() & more.keys():
                raise ValueError(f"{part}: another file of {file.name} has {min(twice)}, too")
            found |= more
        return found
    weights, told = read_safetensors(file, "a whole safetensors file")
    if told.get(_CONFIG_ID) not in (None, config_id):
        raise ValueError(
            f"{file}: saved with another {CONFIG_FILE} than the one beside it, as when a save was "
            "interrupted; save the model again"
        )
    return {name.removeprefix(_WRAPPED): tensor for name, tensor in weights.items()}


def _files_of(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(
            {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: no index of files of weights ({error!r})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
    return [index.with_name(name) for name in names]
