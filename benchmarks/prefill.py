"""Taking in a long prompt, against the reference's forward pass over it.

The quickstart model of benchmarks/generate.py. The reference has no other way to take in a prompt
than a forward pass over all of it; this package runs the stages above over all patches and the
local stage over the last patch alone. The rate of matrix products is that of one large product,
PyTorch's or this package's, whichever is faster, measured after the runs.

    python benchmarks/prefill.py
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from generate import MODELS, build
from side_by_side import machine_line, parser, reference_python, run_worker, spread, write_json


def product_rate(products: list[Callable[[Any, Any], Any]]) -> float:
    """Floating point operations per second of the fastest product of two large matrices."""
    import torch

    side = 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    seconds = []
    for _ in range(5):
        for product in products:
            begin = time.perf_counter()
            product(a, b)
            seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each run over ``length`` bytes; ours with the operations that it takes."""
    import torch

    torch.set_num_threads(job["threads"])
    model = build(job["kind"])
    ids = torch.randint(0, 256, (1, job["length"]))
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + job["runs"]):
            session = model.session() if job["ours"] else None
            begin = time.perf_counter()
            if session is not None:
                session.feed(ids).logits()
            else:
                from mblm import MBLMReturnType

                model.forward(ids, return_type=MBLMReturnType.LOGITS)
            seconds.append(time.perf_counter() - begin)
    result: dict[str, Any] = {"seconds": seconds[1:]}
    if job["ours"]:
        from mblm.ops.linear import linear

        with torch.inference_mode():
            result["rate"] = product_rate([torch.matmul, linear])
        upper = (model.stage_models[0], model.token_embs_rev[1]._post)
        weights = sum(p.numel() for part in upper for p in part.parameters() if p.ndim > 1)
        result["operations"] = 2 * weights * job["length"] / model.seq_lens[1]
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=8184, help="bytes of the prompt")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    python = reference_python(arguments.reference)
    figures: dict[str, Any] = {"machine": machine_line(arguments.threads)}
    print(figures["machine"])
    for kind in arguments.models:
        job = {"kind": kind, "threads": arguments.threads, "length": arguments.length}
        here = run_worker(sys.executable, __file__, {**job, "runs": arguments.runs, "ours": True})
        runs = arguments.runs if kind == "transformer" else 1
        there = run_worker(python, __file__, {**job, "runs": runs, "ours": False})
        ratio = median(there["seconds"]) / median(here["seconds"])
        rate = here["operations"] / median(here["seconds"]) / here["rate"]
        print(
            f"{MODELS[kind]}, {arguments.length:,} bytes: mblm {spread(here['seconds'])} s, "
            f"reference {spread(there['seconds'])} s, {ratio:.1f}x; products of weights at "
            f"{rate:.2f} of the rate of a large product",
            flush=True,
        )
        figures[kind] = {"ours": here, "reference": there}
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
