"""Import a user's modules, which register blocks and datasets of their own."""

import importlib
import sys
from collections.abc import Sequence


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, those in the working folder too."""
    if names and "" not in sys.path:
        sys.path.append("")  # as `python -m` begins with it, and an installed program does not
    for name in names:
        if not name or name.startswith("."):
            raise ValueError(f"--import: expected a module's name, such as my_blocks, got {name!r}")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(f"--import: no module {name} here or on Python's path") from error
