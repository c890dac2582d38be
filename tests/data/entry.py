"""What a dataset reads of a training configuration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any


def entry_config(
    folder: Path, dataset_args: Any = None, train: dict[str, Any] | None = None, **params: Any
) -> Any:
    """One whose data are in a folder, and whose runs would be written into a folder in it."""
    output = str(folder / "output")
    return SimpleNamespace(
        io=SimpleNamespace(dataset_dir=str(folder), dataset_args=dataset_args, output_dir=output),
        train=SimpleNamespace(**(train or {})),
        params=SimpleNamespace(**params),
    )
