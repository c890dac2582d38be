"""Where the time and the memory of some steps go: what `mblm train --profile` writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, schedule

WARM_UP = 2
"""Steps before those that are profiled: the first ones allocate and compile."""


@contextmanager
def profiled(
    steps: int, folder: Path, *, is_cuda: bool, say: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Profile so many steps, or none, of the block, which calls what it is given after each.

    Written are ``trace.json.gz``, which https://ui.perfetto.dev shows; ``operators.txt``, a table;
    and on a GPU ``memory.pickle``, for https://pytorch.org/memory_viz; ``say`` is called with that.
    """
    if not steps:
        yield lambda: None
        return

    def write(profiler: Any) -> None:
        if profiler.step_num < WARM_UP + steps:
            return  # the run was stopped
        files = [folder / name for name in ("trace.json.gz", "operators.txt")]
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(files[0]))
        order = f"self_{'cuda' if is_cuda else 'cpu'}_time_total"
        files[1].write_text(profiler.key_averages().table(sort_by=order, row_limit=40))
        if is_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        say(
            f"Profiled {steps} steps: {files[0]} for https://ui.perfetto.dev, {files[1]}"
            + f", {folder}/memory.pickle for https://pytorch.org/memory_viz" * is_cuda
        )

    def step_done() -> None:
        profiler.step()
        if is_cuda and profiler.step_num == WARM_UP:
            torch.cuda.memory._record_memory_history()

    try:
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_cuda],
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=write,
            profile_memory=True,
        ) as profiler:
            yield step_done
    finally:
        if is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def check_profile(steps: int, left: int) -> None:
    """Refuse to profile more steps than a run has left, by a ValueError."""
    if steps < 0 or (steps and steps + WARM_UP > left):
        raise ValueError(
            f"profile: expected at most {max(left - WARM_UP, 0)} steps, which this run has after "
            f"{WARM_UP} that warm up, got {steps}"
        )
