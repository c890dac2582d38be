"""Find a model or a training run by its name: a folder, a `.pth` file, `latest`, a packaged one."""

import os
import re
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Of weights in several files, as transformers writes them: their index and names.
INDEX_FILE, SHARDS = "model.safetensors.index.json", "model-*-of-*.safetensors"
RUN_CONFIG_FILE = "config.yaml"

DEFAULT_RUNS = Path("data", "output")
"""Where the runs of the configurations that come with this package go."""

PACKAGED_MODELS = Path(__file__).parents[1] / "models"
"""The trained models that come with this package, a folder for each."""

LATEST = "latest"
_BEST, _LEFT = "*_top*.pth", "*_left_*.pth"  # the latter of a way that was abandoned


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder or the ``.pth`` file of a model.

    Args:
        name: A folder that ``save_pretrained`` wrote; a ``.pth`` file; a run's folder, for its best
            model; ``latest`` or ``FOLDER/latest``, for that of the newest run in ``data/output`` or
            in ``FOLDER`` that has one; a model that comes with this package, such as ``python``,
            where no folder of that name holds a model. Anything else is returned as it is: it may
            be a model's id.

    Raises:
        TypeError: The name is neither a text nor a path.
        FileNotFoundError: The name is empty, there is no such run, or it has no model yet.
    """
    path = as_path(name)
    if _is_latest(path):
        return _best_of(_newest_run(path, holds=_BEST))
    if (path / CONFIG_FILE).exists():
        return path
    if (path / RUN_CONFIG_FILE).exists():
        return _best_of(path)
    _refuse_runs(path)
    if not (path / WEIGHTS_FILE).exists():
        return next((model for model in packaged_models() if model.name == os.fspath(name)), path)
    return path


def packaged_models() -> list[Path]:
    """The folders of the models that come with this package, by name."""
    return sorted(file.parent for file in PACKAGED_MODELS.glob(f"*/{CONFIG_FILE}"))


def find_run(name: str | os.PathLike[str], *, holds: str) -> Path:
    """The folder of a run.

    Args:
        name: As for `find_model`, the run of that model. Anything else is returned as it is.
        holds: What the newest run must have, a glob.

    Raises:
        TypeError, FileNotFoundError: As for `find_model`.
    """
    path = as_path(name)
    if _is_latest(path):
        return _newest_run(path, holds=holds)
    if path.suffix == ".pth" or path.name == RUN_CONFIG_FILE:
        return path.parent
    if not any(path.glob(holds)):
        _refuse_runs(path)
    return path


def as_path(name: object, argument: str = "name") -> Path:
    """Refuse what is no name; ``argument`` is what errors call it."""
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected a folder, a file or a model's name, got {name!r}")
    if name == "":  # which a path would take for the folder one is in
        raise FileNotFoundError(f"{argument}: expected that of a model or a run, got an empty text")
    return Path(os.path.expanduser(name))  # which leaves a user that there is not


def _refuse_runs(path: Path) -> None:
    if any(path.glob(f"*/{RUN_CONFIG_FILE}")):
        newest = (path if path.name else path.absolute()) / LATEST  # "latest" is of DEFAULT_RUNS
        raise FileNotFoundError(f"{path} holds runs: name one, or the newest, {newest}")


def _is_latest(path: Path) -> bool:
    return path.name == LATEST and not path.exists()


def _newest_run(path: Path, *, holds: str) -> Path:
    folder = DEFAULT_RUNS if path == Path(LATEST) else path.parent
    runs = [
        file
        for file in folder.glob(f"*/{RUN_CONFIG_FILE}")
        if next(file.parent.glob(holds), None) is not None
    ]
    if not runs:
        raise FileNotFoundError(
            f"{path}: no run with {holds} in {folder}; of another folder the newest is "
            f"FOLDER/{LATEST}"
        )
    return max(runs, key=lambda file: file.stat().st_mtime_ns).parent


def _best_of(run: Path) -> Path:
    """A run's best model; the files are numbered, the best first."""
    numbered = [(re.search(r"_top(\d+)\.pth$", file.name), file) for file in run.glob(_BEST)]
    files = [(int(match[1]), file) for match, file in numbered if match]
    if not files:
        if left := sorted(map(str, run.glob(_LEFT))):
            raise FileNotFoundError(
                f"{run}: this run has no model until it validates again; what it left in going "
                f"back, by loss: {', '.join(left)}"
            )
        raise FileNotFoundError(f"{run}: this run has saved no model yet")
    return min(files)[1]
