"""Where a run's numbers and samples go, too: TensorBoard, Weights & Biases, Trackio."""

import html
import importlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mblm.train.core.telling import tell
from mblm.utils.atomic import atomic_write

Sent = Mapping[str, int]
"""The last batch that was sent of each kind, such as ``train``."""

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Logger(Protocol):
    """One of the places."""

    def rewind(self, step: int, sent: Sent) -> None:
        """Expect the points from a batch on again, some of which were sent there."""

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Take values by their names, of a batch."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Take a text."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the run's folder; those of a run that goes on replace the points after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._purge: int | None = None
        self._sent: Sent = {}
        self._writer: Any = None

    def rewind(self, step: int, sent: Sent) -> None:
        self.close()
        self._writer, self._purge, self._sent = None, step or None, sent

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        board = self._board()
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        if step > self._sent.get("valid", -1):  # texts are not replaced
            self._board().add_text(name, f"<pre>{html.escape(text)}</pre>", step)
            self._board().flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _board(self) -> Any:
        if self._writer is None:
            module = importlib.import_module(_MODULES["tensorboard"])
            self._writer = module.SummaryWriter(str(self._folder), purge_step=self._purge)
        return self._writer


class Tracker:
    """Weights & Biases or Trackio, whose calls are the same. A run that goes on stays one there.

    Points cannot be taken back: those that come again are not sent a second time.
    """

    def __init__(
        self,
        library: str,
        folder: Path,
        project: str,
        config: dict[str, Any],
        log: logging.Logger,
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
        resume = "never" if is_new else "allow"
        self._run = self._library.init(
            project=project, name=name, config=config, resume=resume, **own
        )
        self._sent: Sent = {}

    def rewind(self, step: int, sent: Sent) -> None:
        self._sent = sent

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        if step > self._sent.get(kind, -1):
            self._run.log(dict(values), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self.log("valid", {name: self._library.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All that are configured. One that fails is left out from then on, which is said once.

    The run is one of many of a project; its configuration is plain values.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        project: str,
        config: dict[str, Any],
        log: logging.Logger,
    ) -> None:
        self._log, self._folder = log, folder
        self._last = 0
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                self._loggers[name] = (
                    TensorBoard(folder)
                    if name == "tensorboard"
                    else Tracker(name, folder, project, config, log)
                )
            except Exception as error:
                self._leave_out(name, error)

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def rewind(self, step: int, logged: Sequence[Mapping[str, int]]) -> None:
        """Expect the points from a batch on; a logger that was there before has some of them.

        Args:
            step: The batch; 0 of a run that begins.
            logged: The last batches of each kind that the run's files tell of, which are about to
                drop them. They are noted: the run may be stopped before it has come as far again.
        """
        note = self._folder / "state" / "sent.json"
        before = json.loads(note.read_bytes()) if note.exists() else {}
        sent = before.get("used", {}).items()
        unused: dict[str, Sent] = before.get("unused", {})  # for a while, as without a network
        unused |= {name: _latest([batches, *logged]) for name, batches in sent}
        used = {name: unused.pop(name, {}) for name in self._loggers}
        if used or unused:
            with atomic_write(note) as file:
                file.write(json.dumps({"used": used, "unused": unused}).encode())
        self._last = max(step - 1, 0)
        self._each(lambda name, logger: logger.rewind(step, used[name]))

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values by their names, of a batch, all of a kind; -1 is the last one of the run."""
        self._last = at = max(step, self._last)
        self._each(lambda _, logger: logger.log(kind, values, at))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text that a batch's model has written."""
        self._each(lambda _, logger: logger.log_text(name, text, step))

    def close(self) -> None:
        """End the run there."""
        self._each(lambda _, logger: logger.close())
        self._loggers = {}

    def _each(self, call: Callable[[str, Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(name, logger)
            except Exception as error:
                del self._loggers[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        message = f"{name} has failed and gets nothing more of this run, which goes on: {reason}"
        tell(self._log, message)


def _latest(logged: Iterable[Sent]) -> Sent:
    """The last batch of each kind; of a kind that is of none, of all."""
    sent: dict[str, int] = {}
    for kind, batch in (item for last in logged for item in last.items()):
        sent[kind] = max(batch, sent.get(kind, -1))
    end = max(sent.values(), default=0)
    return {kind: end if batch < 0 else batch for kind, batch in sent.items()}  # see `log`


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose library is missing.

    Raises:
        ValueError: One is; the message says how to get it.
    """
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ValueError(f"io.loggers: {name} needs pip install 'mblm[{name}]'") from error
