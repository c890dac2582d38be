"""Generation at growing contexts and a long prompt, this package and the reference side by side.

The quickstart model with random weights, float32, CPU: once with a Transformer as stage 1, once
with Mamba-1. A byte's time is the interval between two writes to the stream, so that the prompt's
is not in it. The reference has no other way to take in a prompt than a forward pass over all of it.

    python benchmarks/generate.py
"""

import sys
import time
from statistics import median
from typing import Any

from side_by_side import (
    at_least,
    config_of,
    new_figures,
    parse,
    positive,
    reference_python,
    run_worker,
    side_by_side,
    spread,
    write_json,
)

CONTEXTS = (64, 512, 2048, 8184)
PROMPT = 8184
BYTES = 64  # that this package generates per run; whole patches, so that upper stages count
MODELS = {"t": "Transformer/Transformer", "mamba1": "Mamba-1/Transformer"}


def build(kind: str) -> Any:
    """The quickstart model with a stage 1 of this kind, of what both packages offer."""
    import torch

    from mblm import MBLM

    torch.manual_seed(0)
    shape = (1024, [5, 5], [1024, 8])
    return MBLM(config_of([kind, "t"], *shape, first="fixed", use_flash_attn=True)).eval()


class Clock:
    """Stands in for a ByteStreamer and notes when each byte comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def write(self, byte: int) -> None:
        self.times.append(time.perf_counter())

    def flush(self) -> None:
        pass


def generate(model: Any, context: int, count: int) -> float:
    """Seconds per byte after ``context`` bytes."""
    import torch

    clock = Clock()
    ids = torch.randint(0, 256, (context,))
    model.generate(ids, stream=clock, num_tokens_to_generate=1 + count)
    return (clock.times[-1] - clock.times[0]) / count


def take_in(model: Any, length: int) -> float:
    """Seconds until the logits after a prompt are there."""
    import torch

    ids = torch.randint(0, 256, (1, length))
    session = model.session() if hasattr(model, "session") else None
    begin = time.perf_counter()
    with torch.inference_mode():
        if session is not None:
            session.feed(ids).logits()
        else:
            from mblm import MBLMReturnType

            model.forward(ids, return_type=MBLMReturnType.LOGITS)
    return time.perf_counter() - begin


def work(job: dict[str, Any]) -> list[float]:
    """Seconds of each run; a prompt is taken in once before."""
    import torch

    torch.set_num_threads(job["threads"])
    model = build(job["kind"])
    if job["count"]:
        return [generate(model, job["context"], job["count"]) for _ in range(job["runs"])]
    return [take_in(model, job["context"]) for _ in range(1 + job["runs"])][1:]


def main() -> None:
    options = side_by_side(__doc__)
    options.add_argument("--contexts", type=positive, nargs="*", default=CONTEXTS)
    options.add_argument(
        "--prompt", type=at_least(0), default=PROMPT, help="bytes; 0 leaves it out"
    )
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parse(options, work)
    python = reference_python(arguments.reference)
    figures = new_figures(arguments)

    def compare(kind: str, context: int, count: int) -> None:
        """Ours of ``count`` bytes, or of a prompt if it is 0, and the reference's."""
        job = {"kind": kind, "threads": arguments.threads, "runs": arguments.runs, "count": count}
        # Ours are the bytes that lead up to the context, within the model's limit.
        length = max(1, min(context, 8192 - BYTES - 1)) if count else context
        ours = run_worker(sys.executable, __file__, {**job, "context": length})
        # The reference spends seconds to minutes on every byte of a long context.
        if kind == "mamba1" or (count and context > 2048):
            job["runs"] = 1
        job["count"] = min(count, 2)
        theirs = run_worker(python, __file__, {**job, "context": context})
        shown = [[1 / s for s in side] if count else side for side in (ours, theirs)]
        ratio = median(theirs) / median(ours)
        print(
            f"{context:>8}  {spread(shown[0]):>28}  {spread(shown[1]):>32}  {ratio:>6.0f}x",
            flush=True,
        )
        name = f"{kind} {context}" if count else f"{kind}, prompt"
        figures[name] = {"ours": ours, "reference": theirs}

    for kind in arguments.models:
        print(f"\n{MODELS[kind]}: bytes/s, median (range)")
        print(f"{'context':>8}  {'mblm':>28}  {'reference':>32}  {'ratio':>7}")
        for context in arguments.contexts:
            compare(kind, context, BYTES)
        if arguments.prompt:
            print("seconds of a prompt")
            compare(kind, arguments.prompt, 0)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
