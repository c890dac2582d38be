"""What several commands have: arguments, options, a bar that tells how far they are."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mblm.utils.imports import import_modules


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
