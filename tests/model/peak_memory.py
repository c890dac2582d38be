"""How much memory a computation holds at once, for tests of memory bounds."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of the CPU's tensors held at once, beyond those before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        function()
    profiler = measured.profiler
    assert profiler is not None and profiler.kineto_results is not None
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
