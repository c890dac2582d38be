"""The CUDA kernels against plain PyTorch on the same GPU: each operator.

Two processes take the same measurements, one with the kernels and one with MBLM_NATIVE=0. Times
are medians of several batches of runs, of fewer where they take long, after a warm-up that is not
counted.

    python benchmarks/gpu.py [--json FILE] [--quick]

--quick takes tiny sizes, on the CPU where there is no GPU: to try this script.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from side_by_side import json_file, write_json

ENOUGH = 2  # seconds, after which no batch of runs is begun


def seconds(call: Callable[[], Any], device: str, runs: int, repeats: int) -> float:
    """Median time of one call."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: list[float] = []
    begun = time.perf_counter()
    while len(times) <= runs:
        if len(times) > 1 and time.perf_counter() - begun > ENOUGH:
            break
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        times.append((time.perf_counter() - begin) / repeats)
    return median(times[1:])


def operators(
    device: str, quick: bool
) -> dict[str, tuple[Callable[..., Any], list[Any], list[Any]]]:
    """What is measured, by name: a function, its differentiable tensors, its other arguments."""
    import torch
    from torch import Tensor

    from mblm.ops.assemble_stage import assemble_stage
    from mblm.ops.causal_conv import causal_conv
    from mblm.ops.embed_patches import embed_patches
    from mblm.ops.selective_scan import selective_scan
    from mblm.ops.shift_rms_norm import shift_rms_norm
    from mblm.ops.short_attention import short_attention
    from mblm.ops.ssd import ssd

    rows, batch, length, width = (8, 1, 64, 64) if quick else (16384, 4, 4096, 1024)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) / 8

    ids = torch.randint(256, (4 * rows, 8), device=device)
    turns = normal(9, 32, dtype=torch.float32)
    heads = width // 64
    return {
        "shift_rms_norm": (shift_rms_norm, [normal(rows, 9, width), normal(width)], []),
        "assemble_stage": (
            lambda start, table, positions, context, ids: assemble_stage(
                start, table, ids, positions, None, context
            ),
            [normal(width), normal(257, width), normal(8, width), normal(4 * rows, 8, width)],
            [ids],
        ),
        "embed_patches": (
            lambda table, weight, bias, ids: embed_patches(
                ids, table, weight, bias, num_patches=rows // 4, patch_size=8, pad_token_id=256
            ),
            [normal(257, width // 8), normal(width), normal(width)],
            [ids.view(16, -1)],
        ),
        "short_attention": (
            lambda q, k, v, cos, sin: short_attention(q, k, v, (cos, sin)),
            [normal(rows, 9, heads, 64) for _ in range(3)],
            [turns.cos(), turns.sin()],
        ),
        "causal_conv": (
            causal_conv,
            [normal(batch, length, width), normal(width, 1, 4), normal(width)],
            [],
        ),
        "selective_scan": (
            selective_scan,
            [
                normal(batch, length, width),
                positive(batch, length, width),
                -positive(width, 16),
                normal(batch, length, 16),
                normal(batch, length, 16),
                positive(width),
            ],
            [],
        ),
        "ssd": (
            ssd,
            [
                normal(batch, length, heads, 64),
                positive(batch, length, heads),
                -positive(heads),
                normal(batch, length, 128),
                normal(batch, length, 128),
                positive(heads),
            ],
            [],
        ),
    }


def work(quick: bool) -> Iterator[tuple[str, float]]:
    """Milliseconds of each operator's forward pass, and of its forward and backward pass."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    runs, repeats = (1, 1) if quick else (5, 5)
    for name, (function, tensors, others) in operators(device, quick).items():
        with torch.no_grad():
            forward = seconds(
                lambda f=function, a=(*tensors, *others): f(*a), device, runs, repeats
            )
        inputs = [tensor.requires_grad_() for tensor in tensors]
        given = function(*inputs, *others)
        outputs = [given] if isinstance(given, torch.Tensor) else list(given)
        weightings = [torch.ones_like(out) for out in outputs]
        del given, outputs

        def both(function=function, inputs=inputs, others=others, weightings=weightings):  # type: ignore[no-untyped-def]
            given = function(*inputs, *others)
            outputs = [given] if isinstance(given, torch.Tensor) else list(given)
            torch.autograd.grad(outputs, inputs, weightings)

        yield f"{name}, forward", forward * 1e3
        yield f"{name}, forward and backward", seconds(both, device, runs, repeats) * 1e3


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=json_file, help="write all figures to this file")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to try this script")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker:
        for figure in work(arguments.quick):
            print(json.dumps(figure), flush=True)
        return
    import torch

    if not torch.cuda.is_available() and not arguments.quick:
        sys.exit("no GPU: only --quick runs on the CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}; milliseconds")
    results: dict[str, Any] = {"device": device, "torch": torch.__version__}
    command = [sys.executable, __file__, "--worker", *["--quick"] * arguments.quick]
    for side, native in {"kernels": "require", "PyTorch": "0"}.items():
        figures = results[side] = {}
        environment = {**os.environ, "MBLM_NATIVE": native}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as worker:
            for line in worker.stdout or []:
                figures.update([json.loads(line)])
                write_json(arguments.json, results)  # now, lest a time limit take it away
        if worker.returncode:
            sys.exit(f"measuring {side} failed ({worker.returncode})")
    print(f"{'':44} {'kernels':>10} {'PyTorch':>10} {'ratio':>7}")
    for name, plain in results["PyTorch"].items():
        ours = results["kernels"][name]
        print(f"{name:44} {ours:10.3f} {plain:10.3f} {plain / ours:7.2f}")


if __name__ == "__main__":
    main()
