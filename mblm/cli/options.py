"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from mblm.utils.imports import import_modules


def _import(names: list[str] | None) -> list[str]:
    """Import a user's modules as soon as the option is read: commands look blocks up by name."""
    import_modules(names or ())
    return names or []


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
