"""Where the time and the memory of some steps go: what `mblm train --profile` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from typing_extensions import Self

WARM_UP = 2
"""Steps before those that are profiled: the first ones allocate and compile."""


class Profile:
    """Profiles some steps of a run, or none, after `WARM_UP` of them, while the block runs.

    It writes ``trace.json.gz``, which https://ui.perfetto.dev shows; ``operators.txt``, a table;
    and on a GPU ``memory.pickle``, for https://pytorch.org/memory_viz; ``say`` is called with that.
    """

    def __init__(
        self, steps: int, folder: Path, *, is_cuda: bool, say: Callable[[str], object]
    ) -> None:
        self._steps = steps
        self._folder = folder
        self._is_cuda = is_cuda
        self._say = say
        self._done = 0
        self._profiler: Any = None

    def step_done(self) -> None:
        """Note that a step is done, which may be the last one before or of the profile."""
        self._done += 1
        if self._steps and self._done == WARM_UP:
            self._start()
        elif self._profiler is not None and self._done == WARM_UP + self._steps:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:  # the run was stopped
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._is_cuda]
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        if self._is_cuda:
            torch.cuda.memory._record_memory_history()
        self._profiler.start()

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        return profiler

    def _write(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            if self._is_cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            profiler = self._stop()
            profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
            order = f"self_{'cuda' if self._is_cuda else 'cpu'}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=40)
            (self._folder / "operators.txt").write_text(table)
        except (OSError, RuntimeError) as error:  # such as a full disk: the run does not need it
            self._say(f"The profile cannot be written: {error}")
            return
        finally:
            self.__exit__()
        self._say(
            f"Profiled {self._steps} steps: {self._folder}/trace.json.gz for "
            f"https://ui.perfetto.dev, {self._folder}/operators.txt"
            + (f", {self._folder}/memory.pickle for https://pytorch.org/memory_viz")
            * self._is_cuda
        )


def check_profile(steps: int, left: int) -> None:
    """Refuse to profile more steps than a run has left, by a ValueError."""
    if steps < 0 or (steps and steps + WARM_UP > left):
        raise ValueError(
            f"profile: expected at most {max(left - WARM_UP, 0)} steps, which this run has after "
            f"{WARM_UP} that warm up, got {steps}"
        )
