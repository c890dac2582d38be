"""Session files: the states of rows in one safetensors file, with a digest of it all."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mblm.inference.cache import State
from mblm.utils.atomic import atomic_write
from mblm.utils.checkpoint import read_safetensors

FORMAT = "mblm-session-5"
# What reading a header or a state that is no such thing may raise.
DAMAGE = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def write(path: str | Path, header: dict[str, str], states: Sequence[State]) -> None:
    """Write states and what else tells a session, ``header``, whole or not at all."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    rows = [
        {key: _flatten(f"{row}.{key}", value, tensors) for key, value in state.items()}
        for row, state in enumerate({**state, "tail": _narrow(state["tail"])} for state in states)
    ]
    header = {**header, "format": FORMAT, "rows": json.dumps(rows)}
    header["digest"] = _digest(header, tensors)
    with atomic_write(path) as file:
        file.write(save(tensors, header))


def read(path: str | Path) -> tuple[dict[str, str], list[State]]:
    """The header and the states of a file, on the CPU."""
    tensors, header = read_safetensors(path, "a saved session")
    if (given := header.get("format", "none")) != FORMAT:
        if given.startswith(FORMAT.rstrip("0123456789")):
            raise ValueError(
                f"{path}: saved by another release, in format {given}; this one reads {FORMAT}: "
                "feed the bytes again"
            )
        raise ValueError(f"{path}: not a saved session, format is {given}")
    if header.get("digest") != _digest(header, tensors):
        raise ValueError(f"{path}: a damaged session: it is not as Session.save has written it")
    try:
        rows = json.loads(header["rows"])
        states = [
            {key: _unflatten(value, tensors) for key, value in state.items()} for state in rows
        ]
    except DAMAGE as error:
        raise ValueError(f"{path}: a damaged session ({error!r})") from error
    return header, states


def _digest(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    told = {name: value for name, value in header.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _narrow(ids: torch.Tensor) -> torch.Tensor:
    """Token ids in the smallest dtype that has them all."""
    highest = int(ids.max()) if ids.numel() else 0
    fitting = (d for d in (torch.uint8, torch.int16, torch.int32) if highest <= torch.iinfo(d).max)
    return ids.to(next(fitting, ids.dtype))


def _flatten(name: str, state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Structure of a nest as JSON; its tensors are collected by name, on the CPU."""
    if isinstance(state, torch.Tensor):
        tensors[name] = state.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, (list, tuple)):
        return [_flatten(f"{name}.{index}", item, tensors) for index, item in enumerate(state)]
    return state


def _unflatten(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(structure, dict):
        return tensors[structure["tensor"]]
    if isinstance(structure, list):
        return tuple(_unflatten(item, tensors) for item in structure)
    return structure
