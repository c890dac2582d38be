"""One training step of the Mamba stages: time and peak memory against what they replace.

Width 512, d_state 128, 4 layers, 1,024 positions, one row, CPU, float32: forward, backward and
Adam's update. Mamba-1 is compared with mambapy's model of the same parameters, Mamba-2 with this
package in plain PyTorch (`MBLM_NATIVE=0`). Every run is a process of its own, the two sides take
turns, and peak memory is the process's largest resident set, less what it was after the imports.

    python benchmarks/mamba_train.py
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side import machine_line, run_worker, spread, write_json

SIZES = {"d_state": 128, "d_conv": 4}
WIDTH, LAYERS, POSITIONS = 512, 4, 1024


def build(side: str) -> Any:
    import torch

    torch.manual_seed(0)
    if side == "mambapy":
        from mambapy.mamba import Mamba, MambaConfig

        return Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS, expand_factor=2, **SIZES))
    if side == "mamba1":
        from mblm.model.mamba1 import Mamba1

        return Mamba1(model_dim=WIDTH, num_layers=LAYERS, expand=2, **SIZES)
    from mblm.model.mamba2 import Mamba2

    return Mamba2(model_dim=WIDTH, num_layers=LAYERS, expand=2, headdim=64, **SIZES)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step and peak memory in MB, after a step that is not counted."""
    os.environ["MBLM_NATIVE"] = "0" if job["side"] == "mamba2 in PyTorch" else "require"
    import torch

    import mblm.model.mamba1
    import mblm.model.mamba2  # noqa: F401

    torch.set_num_threads(job["threads"])
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = build(job["side"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x = torch.randn(1, POSITIONS, WIDTH)
    seconds, losses = [], []
    for _ in range(1 + job["steps"]):
        begin = time.perf_counter()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "peak_mb": peak - imported, "losses": losses}


def compare(ours: str, theirs: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the two sides in turns and print the ratios."""
    runs: dict[str, list[dict[str, Any]]] = {ours: [], theirs: []}
    for _ in range(arguments.runs):
        for side, results in runs.items():
            job = {"side": side, "threads": arguments.threads, "steps": arguments.steps}
            results.append(run_worker(sys.executable, __file__, job))
    seconds = {side: [s for r in results for s in r["seconds"]] for side, results in runs.items()}
    peaks = {side: median(r["peak_mb"] for r in results) for side, results in runs.items()}
    for side, results in runs.items():
        print(
            f"{side:>17}: {spread(seconds[side])} s a step, {peaks[side]:.0f} MB above the "
            f"imports, loss {results[0]['losses'][-1]:.6f}"
        )
    print(
        f"{ours} takes 1/{median(seconds[theirs]) / median(seconds[ours]):.2f} of the time, "
        f"1/{peaks[theirs] / peaks[ours]:.1f} of the memory"
    )
    return {"seconds": seconds, "peak_mb": peaks}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch threads")
    options.add_argument("--runs", type=int, default=2, help="processes of each side")
    options.add_argument("--steps", type=int, default=2, help="steps timed in each process")
    options.add_argument("--json", type=Path, help="write all figures to this file")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    figures: dict[str, Any] = {"machine": machine_line(arguments.threads)}
    print(figures["machine"])
    figures["mamba1"] = compare("mamba1", "mambapy", arguments)
    figures["mamba2"] = compare("mamba2", "mamba2 in PyTorch", arguments)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
