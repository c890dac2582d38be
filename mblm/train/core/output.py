"""What a run writes into its folder: the rows of its CSV files and its best models."""

import csv
import glob
import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mblm.train.core.training_state import BEST, STATES
from mblm.utils.atomic import atomic_write
from mblm.utils.checkpoint import save_model_state

Row = TypeVar("Row", bound=NamedTuple)

_BEST = Path(STATES, BEST)


class CsvLog(Generic[Row]):
    """Appends rows to a CSV file, each by one write, so that several workers may share the file.

    A worker for which it is not ``enabled`` writes none.
    """

    def __init__(self, file: Path, columns: type[Row], *, enabled: bool) -> None:
        self._file = file
        self._columns = columns._fields
        self._enabled = enabled

    def write_row(self, row: Row) -> None:
        """Append a row."""
        if not self._enabled:
            return
        line = _csv_lines([row]).encode()
        try:
            with self._file.open("ab", buffering=0) as file:
                while line:  # a full disk takes a part first
                    line = line[file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file)) from error

    def last_batches(self) -> dict[str, int]:
        """The last batch of each kind; -1 of those that are of none."""
        batches: dict[str, int] = {}
        for kind, batch, _ in self._rows():
            batches[kind] = max(batch, batches.get(kind, -1))
        return batches

    def keep_before(self, **batches: int) -> None:
        """Drop the rows of each kind from a batch on, all of other kinds, and what a crash cut.

        A file that is not there is begun with its header.
        """
        kept = [
            row
            for kind, batch, row in self._rows()
            if 0 <= batch < batches.get(kind.partition("/")[0], 0)
        ]
        with atomic_write(self._file) as stream:
            stream.write(_csv_lines([self._columns, *kept]).encode())

    def _rows(self) -> Iterator[tuple[str, int, list[str]]]:
        """Kind, batch and all of each row; but for the header, and one that a crash has cut."""
        batch, kind = self._columns.index("cum_batch"), self._columns.index("kind")
        content = self._file.read_bytes() if self._file.exists() else b""
        text = io.StringIO(content[: content.rfind(b"\n") + 1].decode(), newline="")
        for row in csv.reader(text):
            if len(row) == len(self._columns) and row[batch].removeprefix("-").isdigit():
                yield row[kind], int(row[batch]), row


class Ranked(NamedTuple):
    """A model's validation loss, its file, and how many batches the loss does not count."""

    loss: float
    file: str
    left_out: int = 0


class BestModels:
    """The best models of a run, on the disk: ``<name>_top<i>.pth``, the best first.

    Each is written once, to ``state/best``, and stays there while the run or one of its training
    states refers to it; the ``.pth`` files are links to them (copies where there are no links), so
    that a training state keeps its best models without a copy. Of the workers one ``writes``.

    Attributes:
        entries: The models, best first. A loss that leaves batches out ranks only while there is
            none that is whole: they cannot be compared.
    """

    def __init__(self, run_dir: Path, name: str, count: int, *, writes: bool) -> None:
        self._writes = writes
        self._run_dir = run_dir
        self._name = name
        self._count = count
        self.entries: list[Ranked] = []

    def add(self, model: Ranked, state: dict[str, Any]) -> None:
        """Save a model, if it is among the best, and publish the best in their order."""
        candidates = [*self.entries, model]
        whole = [entry for entry in candidates if not entry.left_out]
        best = sorted(whole or candidates, key=_worth)[: self._count]
        if best != self.entries:
            if self._writes and model in best:
                save_model_state(self._run_dir / _BEST, model.file, state, model.loss)
            self.entries = best
            self._publish()

    def restore(self, entries: Iterable[Iterable[Any]]) -> None:
        """Take over what `entries` were, the best of them, and publish it."""
        self.entries = [Ranked(*entry) for entry in entries][: self._count]
        self._publish()

    def best_file(self) -> Path | None:
        """The best model's file, if there is one."""
        return self._published(1) if self.entries else None

    def _publish(self) -> None:
        """Let ``<name>_top<i>.pth`` be the best models, and no others."""
        if not self._writes:
            return
        published = {self._published(n) for n in range(1, len(self.entries) + 1)}
        for file in self._run_dir.glob(f"{glob.escape(self._name)}_top*.pth"):
            if file not in published:  # such as of a run that was to keep more
                file.unlink()
        for index, entry in enumerate(self.entries, start=1):
            source, target = self._run_dir / _BEST / entry.file, self._published(index)
            if not (target.exists() and target.samefile(source)):
                _link(source, target)

    def prune(self, referred: Iterable[str]) -> None:
        """Remove the models that neither the run nor those who refer to them by name need."""
        kept = {entry.file for entry in self.entries} | set(referred)
        for file in (self._run_dir / _BEST).glob("*"):
            if file.name not in kept:
                file.unlink()

    def _published(self, index: int) -> Path:
        return self._run_dir / f"{self._name}_top{index}.pth"


def _worth(model: Ranked) -> tuple[int, bool, float]:
    return model.left_out, math.isnan(model.loss), model.loss  # NaN is the worst


def new_run_dir(wanted: Path) -> Path:
    """Create a folder for a run: as wanted, or with a number if there is one, of another run."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()  # which of several runs that start at once only one can do
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        else:
            return folder


def _link(source: Path, target: Path) -> None:
    """Replace a file by a link to another, or by a copy where the system has no such links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)  # a crash may have left it
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
