"""Stop at the end of a step when the process is asked to, on all workers after the same one."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Self

EXIT_INTERRUPTED = 75
"""Exit code of a run that was stopped by a signal and saved its state: start it again to go on."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(SystemExit):
    """A run was stopped by a signal, after its state was saved. Exits with `EXIT_INTERRUPTED`."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_INTERRUPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Notes SIGTERM and SIGINT while the block runs, and lets the workers agree on when to stop.

    Signals come to the workers at different moments. What a worker has seen by the end of a step
    is exchanged while the next one runs, so that asking costs no waiting.
    """

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        self._group = group
        self._seen = 0
        self._agreed = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._exchange: dist.Work | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._seen = number

    def seen(self, *, is_last: bool) -> signal.Signals | None:
        """The signal to stop for now; to be called after every step, by all workers.

        Args:
            is_last: Whether no step follows, so that nothing needs to be exchanged.
        """
        if self._group is None:
            return signal.Signals(self._seen) if self._seen else None
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
            if number := int(self._agreed):
                return signal.Signals(number)
        if not is_last:
            self._agreed.fill_(self._seen)
            self._exchange = dist.all_reduce(
                self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True
            )
        return None
