"""Scores of a long text against a session byte by byte and against plain forward passes.

Every way has a process of its own, so that its peak memory is seen: above what the process takes
once the model and the text are there. The loss of windows side by side, in one forward pass each,
is what a score without overlap has to do at least.

    python benchmarks/score.py
"""

import os
import sys
from statistics import median
from typing import Any

import torch
from decode import build, clock
from long_context import memory_mib
from side_by_side import new_figures, parse, positive, run_worker, side_by_side, write_json

from mblm import MBLM

SHAPE = (256, [2, 2], [1024, 8])  # width, layers, seq_lens
WINDOW = 8192
TOPS = {"t": "Transformer/Transformer", "mamba2": "Mamba-2/Transformer"}
BY_BYTE = 2000  # bytes that a session takes in


def by_byte(model: MBLM, text: torch.Tensor) -> None:
    session = model.session()
    for byte in text[:BY_BYTE]:
        session.logits().log_softmax(-1)
        session.feed(byte[None])


@torch.inference_mode()
def forward(model: MBLM, text: torch.Tensor) -> None:
    for window in text.split(WINDOW):
        model(window[None])


# What each does with how many bytes; a Transformer as one sequence is a matter of its own.
WAYS: dict[str, Any] = {
    "session, byte by byte": by_byte,
    "loss of windows side by side": forward,
    "score, windows side by side": lambda m, text: m.score(text, length=WINDOW, stride=WINDOW),
    "score, windows that overlap": lambda m, text: m.score(text, length=WINDOW),
    "score, one sequence": lambda m, text: m.score(text),
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    model = build([job["top"], "t"], *SHAPE)
    text = torch.randint(0, 256, (job["bytes"],))
    way = WAYS[job["way"]]
    way(model, text[:64])
    before = memory_mib("VmRSS")
    seconds = [clock(lambda: way(model, text)) for _ in range(job["runs"])]
    return {"seconds": seconds, "mib": memory_mib("VmHWM") - before}


def main() -> None:
    options = side_by_side(__doc__)
    options.add_argument("--bytes", type=positive, default=1 << 20, help="bytes of the text")
    arguments = parse(options, work)
    figures = new_figures(arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    for top, name in TOPS.items():
        print(f"{name}, {arguments.bytes:,} bytes")
        for way in WAYS:
            if way == "score, one sequence" and top == "t":
                continue
            job = {"top": top, "way": way, "runs": arguments.runs}
            job |= {"threads": arguments.threads, "bytes": arguments.bytes}
            found = run_worker(sys.executable, __file__, job, environment)
            count = BY_BYTE if way == "session, byte by byte" else arguments.bytes
            rate = count / median(found["seconds"])
            print(f"  {way:29} {rate:9,.0f} bytes/s, {found['mib']:5.0f} MiB", flush=True)
            figures[f"{name}, {way}"] = {**job, **found, "bytes_per_second": rate}
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
