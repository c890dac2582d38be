"""Where a run's numbers and samples go, too: TensorBoard, Weights & Biases, Trackio."""

import html
import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from mblm.train.core.config import CoreIoConfig
from mblm.train.core.telling import tell
from mblm.utils.errors import describe

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_BOARD, _SAMPLE = "tensorboard", "sample"


class TensorBoard:
    """Event files in the run's folder; points from a batch on replace those before."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        module = importlib.import_module(_MODULES[_BOARD])
        self._board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        self._board.add_text(name, f"<pre>{html.escape(text)}</pre>", step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Tracker:
    """Weights & Biases or Trackio, whose calls are the same. A run that goes on stays one there."""

    def __init__(
        self, library: str, folder: Path, config: dict[str, Any], log: logging.Logger
    ) -> None:
        self._library = importlib.import_module(_MODULES[library])
        id_file = folder / "state" / f"{library}_id"
        is_new = not id_file.exists()
        if is_new:
            id_file.write_text(uuid.uuid4().hex[:12])
        name, own = folder.name, {}
        if library == "wandb":
            settings = self._library.Settings(console="off", silent=True)
            own = {"id": id_file.read_text(), "dir": str(folder), "settings": settings}
            if "WANDB_MODE" not in os.environ and not self._library.login(prompt=False):
                own["mode"] = "offline"
                tell(log, f"wandb: no login; to send it later: wandb sync {folder}/wandb/offline-*")
        project, resume = config["io"]["name_model"], "never" if is_new else "allow"
        self._run = self._library.init(
            project=project, name=name, config=config, resume=resume, **own
        )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self.log({name: self._library.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All that are configured. One that fails is left out from then on, which is said once.

    A point that comes again, of a run that goes on, is sent once: what is sent cannot be taken
    back. ``state/sent.json`` holds the last batch of each kind, such as ``train``, by logger.

    Args:
        names: What is configured.
        folder: The run's.
        config: Its configuration as plain values; the model's name is that of the project.
        log: Is told what goes wrong.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: dict[str, Any], log: logging.Logger
    ) -> None:
        self._folder = folder
        self._log = log
        self._note = folder / "state" / "sent.json"
        self._last = 0
        self._sent: dict[str, dict[str, int]] = {}
        if names and self._note.exists():
            with suppress(ValueError):  # which a crash has cut
                self._sent = json.loads(self._note.read_bytes())
        self._before = deepcopy(self._sent)
        self._loggers: dict[str, TensorBoard | Tracker] = {}
        for name in names:
            with self._leaves_out(name):
                is_board = name == _BOARD
                logger = TensorBoard(folder) if is_board else Tracker(name, folder, config, log)
                self._loggers[name] = logger

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def rewind(self, step: int) -> None:
        """Expect the points from a batch on, some of which may have been sent."""
        self._last = max(step - 1, 0)
        self._before = deepcopy(self._sent)
        if board := self._loggers.get(_BOARD):
            with self._leaves_out(_BOARD):
                board.close()
                self._loggers[_BOARD] = TensorBoard(self._folder, step)

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values by their names, of a batch, all of a kind; -1 is the last one of the run."""
        self._last = at = max(step, self._last)
        self._each(kind, at, lambda logger: logger.log(values, at))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text that a batch's model has written."""
        self._each(_SAMPLE, step, lambda logger: logger.log_text(name, text, step))

    def close(self) -> None:
        """End the run there."""
        for name, logger in list(self._loggers.items()):
            with self._leaves_out(name):
                logger.close()
        self._loggers = {}

    def _each(self, kind: str, step: int, call: Callable[[TensorBoard | Tracker], None]) -> None:
        """Call all that have not been sent it before; TensorBoard replaces all but texts."""
        for name, logger in list(self._loggers.items()):
            replaces = name == _BOARD and kind != _SAMPLE
            if replaces or step > self._before.get(name, {}).get(kind, -1):
                with self._leaves_out(name):
                    call(logger)
                sent = self._sent.setdefault(name, {})
                sent[kind] = max(step, sent.get(kind, -1))
        if self._loggers:
            new = self._note.with_suffix(".tmp")
            with suppress(OSError):  # such as of a full disk, which what is saved next will meet
                new.write_text(json.dumps(self._sent))
                new.replace(self._note)

    @contextmanager
    def _leaves_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # signals end a run by none of these
            self._loggers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            message = (
                f"{name} has failed and gets nothing more of this run, which goes on: {reason}"
            )
            tell(self._log, message)


def logger_names(io: CoreIoConfig) -> list[str]:
    """Those that are configured; one whose library cannot be imported is refused."""
    names = list(dict.fromkeys([*["tensorboard"] * io.tensorboard, *io.loggers]))
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except (Exception, SystemExit) as error:  # what is broken raises anything
            reason = describe(error)
            raise ValueError(
                f"io.loggers: {name} needs pip install 'mblm[{name}]' ({reason})"
            ) from error
    return names
