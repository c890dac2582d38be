"""One training step: time and peak memory against what this package replaces.

Two Transformer stages of 4 layers, width 512, seq_lens [1024, 8], on 8,192 bytes, beside the
reference release; 4 Mamba layers, width 512, d_state 128, on 1,024 positions: Mamba-1 beside
mambapy's model of the same parameters, Mamba-2 beside this package in plain PyTorch. CPU, float32:
forward, backward and Adam's update. Every run is a process of its own, the two sides take turns,
and peak memory is the process's largest resident set, less what it was after the imports.

    python benchmarks/train_step.py
"""

import os
import resource
import sys
import time
from statistics import median
from typing import Any

from side_by_side import (
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

# What is compared with what.
SIDES = {
    "stages": "stages of the reference",
    "mamba1": "mambapy",
    "mamba2": "mamba2 in PyTorch",
}
SIZES = {"d_state": 128, "d_conv": 4}
WIDTH, LAYERS, POSITIONS = 512, 4, 1024


def build(side: str) -> tuple[Any, Any]:
    """A model, and a function that gives a loss."""
    import torch

    torch.manual_seed(0)
    if side.startswith("stages"):
        from mblm import MBLM

        config = config_of(["t", "t"], WIDTH, [LAYERS] * 2, [1024, 8], first="fixed")
        model: Any = MBLM(config).train()
        ids = torch.randint(0, 256, (1, 8192))
        return model, lambda: model(ids)
    if side == "mambapy":
        from mambapy.mamba import Mamba, MambaConfig

        model = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS, expand_factor=2, **SIZES))
    elif side == "mamba1":
        from mblm.model.mamba1 import Mamba1

        model = Mamba1(model_dim=WIDTH, num_layers=LAYERS, expand=2, **SIZES)
    else:
        from mblm.model.mamba2 import Mamba2

        model = Mamba2(model_dim=WIDTH, num_layers=LAYERS, expand=2, headdim=64, **SIZES)
    x = torch.randn(1, POSITIONS, WIDTH)
    return model, lambda: model(x).square().mean()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step and peak memory in MB, after a step that is not counted."""
    os.environ["MBLM_NATIVE"] = "0" if job["side"] == "mamba2 in PyTorch" else "require"
    import torch

    import mblm  # noqa: F401

    torch.set_num_threads(job["threads"])
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model, loss_of = build(job["side"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    seconds, losses = [], []
    for _ in range(1 + job["steps"]):
        begin = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "peak_mb": peak - imported, "losses": losses}


def main() -> None:
    options = side_by_side(__doc__, runs=2)
    options.add_argument("--steps", type=positive, default=2, help="steps timed in each process")
    options.add_argument("--models", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parse(options, work)
    figures = new_figures(arguments)
    for ours in arguments.models:
        theirs = SIDES[ours]
        of_reference = reference_python(arguments.reference) if ours == "stages" else sys.executable
        pythons = {ours: sys.executable, theirs: of_reference}
        results: dict[str, list[dict[str, Any]]] = {ours: [], theirs: []}
        for _ in range(arguments.runs):
            for side, python in pythons.items():
                job = {"side": side, "threads": arguments.threads, "steps": arguments.steps}
                results[side].append(run_worker(python, __file__, job))
        seconds = {side: [s for r in runs for s in r["seconds"]] for side, runs in results.items()}
        peaks = {side: median(r["peak_mb"] for r in runs) for side, runs in results.items()}
        for side, runs in results.items():
            print(
                f"{side:>23}: {spread(seconds[side])} s a step, {peaks[side]:.0f} MB above the "
                f"imports, loss {runs[0]['losses'][-1]:.6f}"
            )
        print(
            f"{ours} takes 1/{median(seconds[theirs]) / median(seconds[ours]):.2f} of the time, "
            f"1/{peaks[theirs] / peaks[ours]:.1f} of the memory",
            flush=True,
        )
        figures[ours] = {"seconds": seconds, "peak_mb": peaks}
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
