"""What a call costs beside its bytes: one byte fed and read, one generated, a fork, a new session.

Each is given in microseconds beyond a byte inside a run of many, measured in turns in one process.

    python benchmarks/calls.py
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from decode import BYTES, MODELS, build, clock
from side_by_side import new_figures, parser, spread, write_json

from mblm.inference.session import Session

CONTEXT = 1000  # bytes fed before
RUN = 256  # bytes of a run
INSIDE, FEED, GENERATE = "a byte inside a run", "feed of one byte and logits", "generate(1)"


def calls(model: Any, weights: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; all go on with sessions of their own."""
    run, read, one, forked = (
        Session(model, weights=weights).feed(torch.randint(0, 256, (CONTEXT,))) for _ in range(4)
    )

    def feed_and_read() -> None:
        read.feed(b"a")
        read.logits()

    return {
        INSIDE: lambda: run.generate(RUN),
        FEED: feed_and_read,
        GENERATE: lambda: one.generate(1),
        "fork": forked.fork,
        "a new session": lambda: Session(model, weights=weights),
    }


def measure(model: Any, weights: str, runs: int) -> dict[str, list[float]]:
    """Microseconds of each call, alternating; single bytes in the same number as a run has."""
    of_call = calls(model, weights)
    for call in of_call.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in of_call}
    for _ in range(runs):
        for name, call in of_call.items():
            if name == INSIDE:
                seconds[name].append(1e6 * clock(call) / RUN)
            elif name in ("fork", "a new session"):
                seconds[name].append(1e6 * median(clock(call) for _ in range(9)))
            else:  # as many as a run has bytes, so that as many patches end
                seconds[name].append(1e6 * sum(clock(call) for _ in range(RUN)) / RUN)
    return seconds


def main() -> None:
    options = parser(__doc__, runs=7)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--weights", nargs="+", choices=BYTES, default=["float32", "int8"])
    arguments = options.parse_args()
    figures = new_figures(arguments)
    for name in arguments.models:
        model = build(*MODELS[name])
        for weights in arguments.weights:
            print(f"{name}, {weights}")
            result = measure(model, weights, arguments.runs)
            inside = median(result[INSIDE])
            for call, values in result.items():
                is_beyond = call in (FEED, GENERATE)
                shown = [value - inside for value in values] if is_beyond else values
                beyond = " beyond a byte inside a run" if is_beyond else ""
                print(f"  {call:28} {spread(shown, '.0f')} us{beyond}", flush=True)
            figures[f"{name}, {weights}"] = result
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
