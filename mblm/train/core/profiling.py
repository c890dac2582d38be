"""Where the time and the memory of some steps go: what `mblm train --profile` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, schedule
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
        self._steps, self._folder, self._is_cuda, self._say = steps, folder, is_cuda, say
        self._profiler: Any = None
        if steps:
            self._profiler = torch.profiler.profile(
                activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_cuda],
                schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
                profile_memory=True,
            )

    def step_done(self) -> None:
        """Note that a step is done, which may be the last one before or of the profile."""
        if self._profiler is not None:
            self._profiler.step()
            if self._is_cuda and self._profiler.step_num == WARM_UP:
                torch.cuda.memory._record_memory_history()

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if self._is_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: Any) -> None:
        if profiler.step_num < WARM_UP + self._steps:
            return  # the run was stopped
        files = [self._folder / name for name in ("trace.json.gz", "operators.txt")]
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(files[0]))
        order = f"self_{'cuda' if self._is_cuda else 'cpu'}_time_total"
        files[1].write_text(profiler.key_averages().table(sort_by=order, row_limit=40))
        if self._is_cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._say(
            f"Profiled {self._steps} steps: {files[0]} for https://ui.perfetto.dev, {files[1]}"
            + f", {self._folder}/memory.pickle for https://pytorch.org/memory_viz" * self._is_cuda
        )


def check_profile(steps: int, left: int) -> None:
    """Refuse to profile more steps than a run has left, by a ValueError."""
    if steps < 0 or (steps and steps + WARM_UP > left):
        raise ValueError(
            f"profile: expected at most {max(left - WARM_UP, 0)} steps, which this run has after "
            f"{WARM_UP} that warm up, got {steps}"
        )
