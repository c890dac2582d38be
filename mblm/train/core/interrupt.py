"""What a run is asked for while it trains, to stop and to save: by all workers at one batch."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from typing_extensions import Self

from mblm.utils.interrupt import handled

T = TypeVar("T")

EXIT_INTERRUPTED = 75
"""Exit code of a run that was stopped by a signal and saved its state: start it again to go on."""

STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""The signals that a run stops for, those that schedulers of clusters send included."""


class TrainingInterrupted(SystemExit):
    """A run was stopped by a signal, after its state was saved. Exits with `EXIT_INTERRUPTED`."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_INTERRUPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Requests:
    """Notes signals and the time while the block runs, and lets the workers agree on what to do.

    Signals come to the workers at different moments. What a worker has seen by the end of a step
    is exchanged while the next one runs, so that asking costs no waiting. SIGTERM asks a run to
    stop, and so do SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 unless they are ignored, as after ``nohup``.
    After ``save_every`` seconds without a `saved`, it is time to save; 0: never.
    """

    def __init__(self, group: "dist.ProcessGroup | None", save_every: float) -> None:
        self._group = group
        self._save_every = save_every
        self._saved = time.monotonic()
        self._signal = 0
        self._agreed = torch.zeros(2, dtype=torch.int64, device="cpu")  # signal, whether to save
        self._exchange: dist.Work | None = None
        self._handled = handled(STOPS, self._note, even_ignored=[signal.SIGTERM])

    def __enter__(self) -> Self:
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def saved(self) -> None:
        """Note that the run was saved just now."""
        self._saved = time.monotonic()

    def after_batch(self, *, is_last: bool) -> tuple[signal.Signals | None, bool]:
        """The signal to stop for now, and whether it is time to save; called by all workers."""
        is_due = 0 < self._save_every <= time.monotonic() - self._saved
        number, saves = self._signal, is_due
        if self._group is not None:
            number, saves = 0, False
            if self._exchange is not None:
                self._exchange.wait()
                self._exchange = None
                number, saves = self._agreed.tolist()
            if not is_last and not number:
                self._agreed[0], self._agreed[1] = self._signal, is_due
                self._exchange = dist.all_reduce(
                    self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True
                )
        return signal.Signals(number) if number else None, bool(saves)

    def check(self, place: str) -> None:
        """Raise `TrainingInterrupted` if it is to stop now, between two batches of a validation."""
        if number := self.after_batch(is_last=False)[0]:
            raise TrainingInterrupted(f"Stopped by {number.name} {place}")


def start_loading(loader: "DataLoader[T]") -> Iterator[T]:
    """Iterate over a loader whose processes live on when a signal reaches the whole process group.

    The batch that is being trained on needs them. They end when this process tells them to.
    """
    if not loader.num_workers or not hasattr(signal, "sigwaitinfo"):
        return iter(loader)
    if not isinstance(loader.worker_init_fn, _LoaderProcess):
        loader.worker_init_fn = _LoaderProcess(loader.worker_init_fn)
    # Blocked signals are so for the processes, too, from their start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _LoaderProcess:
    """What a loader's process does first: from now on only its owner can end it by SIGTERM."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._owner = os.getpid()
        self._init = init

    def __call__(self, worker: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # not so from a server that was there
        threading.Thread(target=self._wait, daemon=True).start()
        if self._init is not None:
            self._init(worker)

    def _wait(self) -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != self._owner:
            pass
        os._exit(0)
