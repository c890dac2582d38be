"""What several commands have: arguments, options, a model, a bar that tells how far they are."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mblm.model.find import CONFIG_FILE, RUN_CONFIG_FILE
from mblm.utils.imports import import_modules

if TYPE_CHECKING:
    from mblm import MBLM


def _import(names: list[str] | None) -> list[str]:
    """Import a user's modules as soon as the option is read: commands look blocks up by name."""
    import_modules(names or ())
    return names or []


def byte_bar(total: int | None) -> Any:
    """A bar of bytes on a terminal; None or 0: there is no saying how many."""
    from tqdm import tqdm

    is_off = not sys.stderr.isatty()
    return tqdm(total=total or None, unit="B", unit_scale=True, leave=False, disable=is_off)


def shown_name(file: Path) -> str:
    """A file's name as any reader of UTF-8 takes it, whatever its bytes are."""
    return os.fsencode(file).decode(errors="replace")


def load(checkpoint: Path, config: Path | None, device: str | None) -> "MBLM":
    """The model of a folder or a ``.pth`` file, in float32, on a device that works."""
    from mblm import MBLM
    from mblm.model.pretrained import load_checkpoint
    from mblm.utils.cuda import find_device

    place = find_device(device)
    model = load_checkpoint(MBLM, checkpoint, config_file=config, map_location=place)
    return model.float()  # the fast way to generate, also from weights saved in bfloat16


def check_out(out: Path, checkpoint: Path, *inputs: Path | None) -> None:
    """Refuse to write where nothing can be written, or over what is read."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: {out} is a folder or in a folder that does not exist")
    of_model = [checkpoint, checkpoint / CONFIG_FILE, *checkpoint.glob("*.safetensors*")]
    for file in (*of_model, checkpoint.with_name(RUN_CONFIG_FILE), *inputs):
        if out.exists() and file is not None and file.exists() and out.samefile(file):
            raise ValueError(f"--out: {out} is read by this command and would be lost")


# What several commands take.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder from save_pretrained, a training run's folder, its .pth file, latest (the "
        "newest run in data/output; of another folder FOLDER/latest), a name that `mblm models` "
        "lists, or a model's id on the hub.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. [default: cuda if available]")
]
RunConfig = Annotated[
    Path | None, typer.Option(help="The config.yaml of a .pth file, if not beside it.")
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import this Python module first, which registers blocks or datasets of your own; "
        "may be given several times.",
    ),
]
