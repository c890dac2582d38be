"""The longest sequence of which one training step fits on a GPU, in full precision.

The published 3D shape of 360M parameters (configs/pg19_3d_stt.yaml: Mamba-2 over two Transformers)
takes forward, backward and Adam's update in float32, in tiles (`tile`), with the most global
stage's activations recomputed (`checkpoint_global`) and what is left of them on the host
(`offload`). The length is doubled from --first until a step does not fit, then the gap is halved
until it is below a sixteenth. Each length has a process of its own, so that none meets the
fragments of another's memory. PyTorch may take --gigabytes of the card, and what the libraries
take comes on top.

    python benchmarks/gpu_long_context.py --json build/gpu_long_context.json

It stops before a step that, at the last fitting one's time per byte, does not end within --seconds.
--quick takes tiny sizes up to --most bytes, on the CPU where there is no GPU: to try this script.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import json_file, parse, positive, run_worker, write_json

ROOT = Path(__file__).resolve().parents[1]
GAP = 1 / 16


def longest(
    step: Callable[[int], dict[str, Any]], first: int, most: int | None, seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """Steps at growing lengths, then between what fits and what does not, and why they ended.

    Args:
        step: Takes a step on so many bytes; gives whether it ``fits``, and its ``wall_s``.
        first: Bytes of the first.
        most: Bytes beyond which none is tried.
        seconds: For all steps.
    """
    results: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    count, fitting, failing, per_byte = first, 0, math.inf, 0.0
    while True:
        if time.monotonic() + count * per_byte > end:
            return results, "no time is left for a longer step"
        result = step(count)
        results.append(result)
        if result["fits"]:
            fitting, per_byte = count, result["wall_s"] / count
        else:
            failing = count
        if most is not None and fitting >= most:
            return results, f"{most:,} bytes were asked for at most"
        if failing <= 1:
            return results, "nothing fits"
        if failing - fitting <= max(1, GAP * fitting):
            return results, "the next length tried does not fit"
        if failing < math.inf:
            count = (fitting + int(failing)) // 2
        else:
            count = 2 * fitting if most is None else min(2 * fitting, most)


def build(job: dict[str, Any]) -> Any:
    import yaml

    from mblm import MBLM, MBLMModelConfig

    params = yaml.safe_load((ROOT / "configs" / "pg19_3d_stt.yaml").read_text())["params"]
    del params["input_seq_len"]
    first, middle, local = params["seq_lens"]
    params["seq_lens"] = [max(first, -(-job["bytes"] // (middle * local))), middle, local]
    if job["quick"]:
        params["hidden_dims"], params["num_layers"] = [64, 64, 64], [1, 1, 1]
    params.update(
        train_checkpoint_chunks=None, tile=job["tile"], checkpoint_global=True, offload=True
    )
    return MBLM(MBLMModelConfig(**params)).train()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One step: whether it fits, its seconds, and the largest memory in MiB."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["gigabytes"] * 1e9 / total))
    begin, fits, why, loss = time.perf_counter(), True, None, None
    try:
        model = build(job).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        def step(count: int) -> float:
            # Byte 0 is the padding of the published shape.
            out = model(torch.randint(1, 256, (1, count), device=device))
            out.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(out.detach())  # waits for the GPU

        step(model.patch_sizes[0])  # makes Adam's moments, which every later step finds
        begin = time.perf_counter()
        loss = step(job["bytes"])
    except torch.OutOfMemoryError as error:
        fits, why = False, str(error)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    result = {
        "fits": fits,
        "why": why,
        "wall_s": seconds,
        "loss": loss,
        "host_peak_mib": host,
    }
    if device == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        result["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return result


def run(job: dict[str, Any]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        result = run_worker(sys.executable, __file__, job)
    except subprocess.CalledProcessError as error:
        if error.returncode != -9:  # by the kernel, where the host's memory is at an end
            raise
        why = "the process was killed: the host's memory may be at an end"
        result = {"fits": False, "why": why, "wall_s": time.monotonic() - begin}
    where = "" if result["fits"] else ": does not fit"
    peaks = {"peak_mib": "GPU", "host_peak_mib": "host"}
    held = [f"{name} {result[key]:,.0f} MiB" for key, name in peaks.items() if key in result]
    print(f"{job['bytes']:,} bytes, {result['wall_s']:.1f} s{where}; {', '.join(held)}", flush=True)
    return {"bytes": job["bytes"], **result}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--first", type=positive, help="bytes of the first step [default: 3,125,000]"
    )
    options.add_argument("--most", type=positive, help="bytes of the longest [default: no limit]")
    options.add_argument("--tile", type=positive, help="positions of a tile [default: 8192]")
    options.add_argument("--gigabytes", type=float, default=80, help="of the GPU's memory [80]")
    options.add_argument("--seconds", type=float, default=3600, help="for all steps [3600]")
    options.add_argument("--json", type=json_file, help="write all figures to this file")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to try this script")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parse(options, work)
    import torch

    if not torch.cuda.is_available() and not arguments.quick:
        sys.exit("no GPU: only --quick runs on the CPU")
    first, most, tile = (1_000, 4_000, 256) if arguments.quick else (3_125_000, None, 8192)
    first, most, tile = arguments.first or first, arguments.most or most, arguments.tile or tile
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, tiles of {tile:,} positions")
    job = {"tile": tile, "gigabytes": arguments.gigabytes, "quick": arguments.quick}
    results, ended = longest(
        lambda count: run({**job, "bytes": count}), first, most, arguments.seconds
    )
    best = max((result["bytes"] for result in results if result["fits"]), default=0)
    print(f"longest: {best:,} bytes; {ended}")
    figures = {"device": device, "torch": torch.__version__, **job, "longest_bytes": best}
    write_json(arguments.json, {**figures, "ended": ended, "steps": results})


if __name__ == "__main__":
    main()
