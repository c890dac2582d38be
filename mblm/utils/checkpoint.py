"""Save a model's weights to a file and load them, checked, from one. Public names: `mblm.utils.io`.

A checkpoint is what ``torch.save`` makes of ``{"MODEL": state_dict, "LOSS": float}``.
"""

import os
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import torch

from mblm.utils.atomic import atomic_write

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION

StateDict: TypeAlias = dict[str, Any]
Module = TypeVar("Module", bound=torch.nn.Module)
File: TypeAlias = str | os.PathLike[str]

_COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module that it wraps


def save_model_state(
    dir: str | Path,
    checkpoint_name: str,
    model: torch.nn.Module | StateDict,
    loss: float,
) -> tuple[bool, Path]:
    """Save a model's weights and loss; the file is replaced as a whole or left as it was.

    Weights have the names that they have without ``torch.compile``.

    Args:
        dir: Folder of the file, created if missing.
        checkpoint_name: Name of the file; its suffix becomes ``.pth``.
        model: A module or its state dict.
        loss: The model's loss.

    Returns:
        Whether a file was overwritten, and the file.

    Raises:
        TypeError: `model` or `loss` is of another type.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(state, dict):
        raise TypeError(f"model must be a module or a state dict, got {type(model).__name__}")
    try:
        loss = float(loss)
    except (TypeError, ValueError):
        raise TypeError(f"loss must be a number, got {loss!r}") from None
    file = Path(dir, checkpoint_name).with_suffix(".pth")
    file.parent.mkdir(parents=True, exist_ok=True)
    did_overwrite = file.exists()
    save_tensors(file, {"MODEL": uncompiled(state), "LOSS": loss})
    return did_overwrite, file


def save_tensors(file: File, content: Any) -> None:
    """Do as ``torch.save``, but replace the file as a whole or leave it as it was."""
    try:
        with atomic_write(file) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, cause.filename or str(file)) from error


def load_tensors(
    file: File, what: str, map_location: "MAP_LOCATION | None" = "cpu", *, mmap: bool = False
) -> Any:
    """Do as ``torch.load`` with a file that is to be something of tensors and plain values."""
    try:
        return torch.load(file, map_location, weights_only=True, mmap=mmap)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(
            f"{file} cannot be read as {what} of tensors and plain values "
            f"(nothing else in it was run): {reason}"
        ) from error


def read_safetensors(file: File, what: str) -> tuple[StateDict, dict[str, str]]:
    """The tensors of a file that is to be such a one, on the CPU, and what it says of itself."""
    from safetensors import SafetensorError, safe_open

    Path(file).open("rb").close()  # safetensors calls one that may not be read missing
    try:
        with safe_open(file, "pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return state, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: not {what} ({error})") from error


def load_model_state(
    checkpoint_file: str | Path,
    model: Module,
    map_location: "MAP_LOCATION | None" = None,
    map_extend_embeddings: Collection[str] | None = None,
    map_rename_modules: Iterable[tuple[str, str]] | None = None,
    on_success: Callable[[str], Any] | None = None,
) -> tuple[Module, float]:
    """Load a checkpoint into a model of the same layout.

    Nothing but tensors and plain values is unpickled, and `model` changes only after the whole
    checkpoint was found to fit. A model whose keys have changed over time may have a method
    ``migrate_state_dict(state_dict) -> state_dict``, which is given the (renamed) state dict.

    Args:
        checkpoint_file: A file written by `save_model_state`.
        model: The module to load into.
        map_location: Where to put the tensors, as for ``torch.load``.
        map_extend_embeddings: Keys whose tensors may have fewer rows in the checkpoint than in
            `model`: they fill the first rows, the other rows of `model` stay. ``*`` in a key
            stands for any text.
        map_rename_modules: Pairs of a prefix of keys in the checkpoint and what replaces it. The
            first pair that matches a key counts.
        on_success: Called with a message for every tensor that was renamed or extended.

    Returns:
        `model` and the checkpoint's loss.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or is damaged or unsafe; it does not fit `model`:
            missing, unexpected or mismatched tensors, all of them named; or a weight is NaN or
            infinite.
    """
    state, loss = read_checkpoint(checkpoint_file, map_location)
    messages: list[str] = []
    if map_rename_modules is not None:
        state = _rename(checkpoint_file, state, list(map_rename_modules), messages)
    load_checked_state(checkpoint_file, state, model, map_extend_embeddings or (), messages)
    if on_success is not None:
        for message in messages:
            on_success(message)
    return model, loss


def load_checked_state(
    file: File,
    state: StateDict,
    model: torch.nn.Module,
    extend: Collection[str] = (),
    messages: list[str] | None = None,
) -> None:
    """Load weights into a model that they fit exactly; otherwise the model is left as it was.

    Names may be those of an older release, which the model's ``migrate_state_dict`` renames, and
    those of a model any part of which is or was replaced by ``torch.compile`` of itself. ``file``
    is for error messages, ``extend`` is ``map_extend_embeddings`` of `load_model_state`.
    """
    own = model.state_dict()
    own_names = {_uncompiled(name): name for name in own}
    expected, state = uncompiled(own), uncompiled(state)
    migrate = getattr(model, "migrate_state_dict", None)
    if migrate is not None:
        state = migrate(state)
    state = _extend(state, expected, extend, [] if messages is None else messages)
    _check_fit(file, state, expected, type(model).__name__)
    _check_finite(file, state, model)
    _check_tied(file, state, model)
    model.load_state_dict({own_names[name]: value for name, value in state.items()}, strict=True)


def uncompiled(state: StateDict) -> StateDict:
    """A state dict by the names that it has without ``torch.compile`` of any submodule."""
    if not any(_COMPILED in name for name in state):
        return state  # with what PyTorch has written beside its entries
    return {_uncompiled(name): value for name, value in state.items()}


def _uncompiled(name: str) -> str:
    return name.replace(_COMPILED, "")


def read_checkpoint(
    file: File, map_location: "MAP_LOCATION | None" = "cpu", *, mmap: bool = False
) -> tuple[StateDict, float]:
    """A checkpoint's state dict and loss; raises as `load_model_state` does of a file alone."""
    if isinstance(map_location, str):
        torch.device(map_location)  # whose own words are clear
    content = load_tensors(file, "a checkpoint", map_location, mmap=mmap)
    if not isinstance(content, dict) or not {"MODEL", "LOSS"} <= content.keys():
        raise ValueError(f'{file} is no checkpoint: it needs the entries "MODEL" and "LOSS"')
    state, loss = content["MODEL"], content["LOSS"]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f'{file}: "MODEL" must be a dict of tensors by name, got {type(state).__name__}'
        )
    try:
        return state, float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'{file}: "LOSS" must be a number, got {type(loss).__name__}') from None


def _rename(
    file: File, state: StateDict, prefixes: list[tuple[str, str]], messages: list[str]
) -> StateDict:
    """Replace the first matching prefix of every key."""
    renamed: StateDict = {}
    for key, value in state.items():
        new_key = next((new + key[len(old) :] for old, new in prefixes if key.startswith(old)), key)
        if new_key in renamed:
            raise ValueError(f"{file}: map_rename_modules gives two tensors the name {new_key}")
        renamed[new_key] = value
        if new_key != key:
            messages.append(f"Renamed {key} to {new_key}")
    return renamed


def _extend(
    state: StateDict, expected: StateDict, keys: Collection[str], messages: list[str]
) -> StateDict:
    """Fill up tensors that have fewer rows than the model's with the model's own rows.

    A tensor that cannot be extended is left as it is, for `_check_fit` to name.
    """
    extended = state.copy()
    for key in state:
        if key not in keys and not any(fnmatchcase(key, pattern) for pattern in keys):
            continue
        rows, table = state.get(key), expected.get(key)
        if not _is_dense(rows) or not _is_dense(table) or not 0 < rows.dim() == table.dim():
            continue
        num_rows, num_all = rows.shape[0], table.shape[0]
        if rows.shape[1:] == table.shape[1:] and num_rows <= num_all:
            # (V_old, …) and (V_new - V_old, …); where dtypes differ, the wider one
            extended[key] = torch.cat((rows, table[num_rows:].to(rows.device)))
            messages.append(f"Loaded {num_rows} of {num_all} rows of {key}")
    return extended


def _check_fit(file: File, state: StateDict, expected: StateDict, model_name: str) -> None:
    """Name all tensors that are missing, unexpected or unlike the model's."""
    mismatches = []
    for key, want in expected.items():
        if key not in state or not isinstance(want, torch.Tensor):
            continue  # the latter: extra state, which only its module can judge
        got = state[key]
        if want.is_meta:
            mismatches.append(f"{key}: the model's is on the meta device, which holds no values")
        elif not _is_dense(got):
            is_meta = isinstance(got, torch.Tensor) and got.is_meta
            kind = "a tensor without values" if is_meta else type(got).__name__
            mismatches.append(f"{key}: expected a dense tensor, got {kind}")
        elif got.shape != want.shape:
            mismatches.append(f"{key}: expected {tuple(want.shape)}, got {tuple(got.shape)}")
        elif not torch.can_cast(got.dtype, want.dtype):
            mismatches.append(f"{key}: expected {want.dtype}, got {got.dtype}")
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "mismatched": mismatches,
    }
    found = [f"{kind}: {listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{file} does not fit {model_name}: {' | '.join(found)}")


def _check_finite(file: File, state: StateDict, model: torch.nn.Module) -> None:
    """Name all weights that are NaN or infinite. Buffers may be: a mask often is."""
    bad = [
        key
        for name, weight in model.named_parameters(remove_duplicate=False)
        if (key := _uncompiled(name)) in state
        and not torch.isfinite(state[key].to(weight.dtype)).all()
    ]
    if bad:
        raise ValueError(f"{file} holds NaN or infinite values in {listing(bad, ', ')}")


def _check_tied(file: File, state: StateDict, model: torch.nn.Module) -> None:
    """Name two weights that differ and are one in the model, which could keep but one of them."""
    names: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        name = _uncompiled(name)
        first = names.setdefault(id(weight), name)
        if first != name and not torch.equal(state[first], state[name]):
            raise ValueError(
                f"{file}: {first} and {name} differ, but are tied in {type(model).__name__}"
            )


def _is_dense(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def listing(names: list[str], separator: str = "; ") -> str:
    """The first eight of some names, and how many more there are."""
    more = len(names) - 8
    return separator.join(names[:8]) + f" and {more} more" * (more > 0)
