"""Long sequences: peak memory and time of steps in tiles and of the reference's.

The published 3D shape, 9 / 8 / 8 layers of reduced width, CPU, float32. A step is forward,
backward and Adam's update, in a process of its own that has taken a step on one patch before. Peak
memory is the process's largest resident set, less what it was after the imports. What a sequence
costs, per byte of it, is told in two ways: the peak less what no sequence changes (what was
resident before the step, which is libraries, weights and Adam's two moments, and the gradients);
and the slope, the difference of two peaks over the difference of the lengths, where one of them is
a quarter of the other.

With MALLOC_MMAP_THRESHOLD_=131072 in the environment, glibc maps every block of 128 KiB or more and
gives it back when it is freed. By default it raises that limit to 32 MiB as such blocks are freed,
and what it then takes from its heap stays resident: the largest resident set tells more of malloc
than of the tensors.

    python benchmarks/long_context.py memory         # against the reference, 131,072 bytes
    python benchmarks/long_context.py shape          # the same with seq_lens [.., 200, 25]
    python benchmarks/long_context.py longest --bytes 5_000_000   # one step, Mamba-2 on top
    python benchmarks/long_context.py longest --bytes 5_000_000 --top t
"""

import sys
import time
from pathlib import Path
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
    write_json,
)

LAYERS = [9, 8, 8]


def build(job: dict[str, Any]) -> Any:
    import torch

    from mblm import MBLM

    torch.manual_seed(0)
    middle, local = job["inner"]
    seq_lens = [max(8192, -(-job["bytes"] // (middle * local))), middle, local]
    kinds, layers = [job["top"], "t", "t"], job["layers"]
    config = config_of(kinds, job["width"], layers, seq_lens, first="fixed", **job["settings"])
    return MBLM(config).train()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and memory in MiB."""
    import torch

    import mblm
    import mblm.model.mblm

    assert mblm.MBLM
    torch.set_num_threads(job["threads"])
    imported = memory_mib("VmRSS")
    model = build(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(count: int) -> float:
        loss = model(torch.randint(0, 256, (1, count)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step(job["inner"][0] * job["inner"][1])
    before = memory_mib("VmRSS")
    wall, cpu, losses = [], [], []
    for _ in range(job["steps"]):
        begin = time.perf_counter(), time.process_time()
        losses.append(step(job["bytes"]))
        wall.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    peak = memory_mib("VmHWM")
    return {
        **job,
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mib": peak - imported,
        "weights_mib": weights,
        "before_mib": before - imported,
        "sequence_kib_per_byte": (peak - before - weights) * 1024 / job["bytes"],
        "losses": losses,
    }


def memory_mib(name: str) -> float:
    """This process's resident memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(name: str, python: Path | str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and print a line of it."""
    result = run_worker(python, __file__, job)
    count = result["bytes"]
    print(
        f"{name:>18}: {count:,} bytes, {median(result['wall_s']):.1f} s a step "
        f"({median(result['cpu_s']) / count * 1e6:.0f} us of CPU a byte), peak "
        f"{result['peak_mib']:.0f} MiB, the sequence's {result['sequence_kib_per_byte']:.2f} KiB "
        f"a byte, loss {result['losses'][0]:.4f}",
        flush=True,
    )
    return result


def job_of(arguments: Any, top: str, inner: list[int], **settings: Any) -> dict[str, Any]:
    return {
        "threads": arguments.threads,
        "width": arguments.width,
        "layers": arguments.layers,
        "bytes": arguments.bytes,
        "steps": arguments.runs,
        "inner": inner,
        "top": top,
        "settings": {"train_checkpoint_chunks": None, **settings},
    }


def tiled(arguments: Any, top: str, inner: list[int]) -> dict[str, Any]:
    """A step of this package."""
    job = job_of(arguments, top, inner, tile=arguments.tile, checkpoint_global=True)
    return measure("in tiles", sys.executable, job)


def compare(arguments: Any, inner: list[int]) -> dict[str, Any]:
    """Steps of both packages, of a quarter of the sequence and of all of it."""
    whole, python = arguments.bytes, reference_python(arguments.reference)
    results: dict[str, Any] = {}
    for arguments.bytes in (whole // 4, whole):
        ours = tiled(arguments, "t", inner)
        chunks = arguments.chunks
        job = job_of(arguments, "t", inner, train_checkpoint_chunks=chunks)
        theirs = measure(f"reference {chunks}", python, job)
        results[f"{arguments.bytes} bytes"] = {"in tiles": ours, "reference": theirs}
    first = results[f"{whole // 4} bytes"]
    slope = {
        name: (result["peak_mib"] - first[name]["peak_mib"]) * 1024 / (whole - whole // 4)
        for name, result in (("in tiles", ours), ("reference", theirs))
    }
    key = "sequence_kib_per_byte"
    print(
        f"the sequence takes 1/{theirs[key] / ours[key]:.1f} of the reference's memory, all "
        f"that the step takes 1/{theirs['peak_mib'] / ours['peak_mib']:.1f}; one more byte "
        f"{slope['in tiles']:.3f} KiB against {slope['reference']:.2f}; "
        f"{sum(ours['cpu_s']) / sum(theirs['cpu_s']):.2f} of its CPU time"
    )
    return {**results, "slope_kib_per_byte": slope}


def main() -> None:
    options = side_by_side(__doc__, runs=1)
    options.add_argument(
        "part", nargs="?", choices=["memory", "shape", "longest"], default="memory"
    )
    options.add_argument("--bytes", type=at_least(4), default=131_072, help="bytes of a sequence")
    options.add_argument("--width", type=positive, default=256, help="width of all stages")
    options.add_argument(
        "--layers", type=positive, nargs=3, default=LAYERS, help="layers of the three stages"
    )
    options.add_argument(
        "--top", choices=["mamba2", "t"], default="mamba2", help="stage 1 of `longest`"
    )
    options.add_argument("--tile", type=positive, default=512, help="positions of a tile")
    options.add_argument(
        "--chunks",
        type=positive,
        nargs=2,
        default=[10, 20],
        help="the reference's checkpoint chunks",
    )
    arguments = parse(options, work)
    figures = new_figures(arguments)
    if arguments.part == "longest":
        figures["longest"] = tiled(arguments, arguments.top, [16, 8])
    else:
        inner = [16, 8] if arguments.part == "memory" else [200, 25]
        figures[arguments.part] = compare(arguments, inner)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
