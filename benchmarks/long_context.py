"""Long sequences: time and peak memory of steps in tiles, without, of the reference's; evaluation.

The published 3D shape, 9 / 8 / 8 layers of reduced width, CPU, float32. A step is forward,
backward and Adam's update, in a process of its own that has taken a step on one patch before. Peak
memory is the process's largest resident set, less what it was after the imports. What a sequence
costs, per byte of it, is told in two ways: the peak less what no sequence changes (what was
resident before the step, which is libraries, weights and Adam's two moments, and the gradients);
and the slope, the difference of two peaks over the difference of the lengths, where one of them is
a quarter of the other.

With `--mapped`, glibc maps every block of 128 KiB or more and gives it back when it is freed. By
default it raises that limit to 32 MiB as such blocks are freed, and what it then takes from its
heap stays resident: the largest resident set tells more of malloc than of the tensors.

    python benchmarks/long_context.py memory         # against the reference, 131,072 bytes
    python benchmarks/long_context.py shape          # the same with seq_lens [.., 200, 25]
    python benchmarks/long_context.py time --bytes 8192 --runs 3   # tiles, none, the reference
    python benchmarks/long_context.py curve          # 64 KiB to 5 MB, Mamba-2 on top, draws docs/
    python benchmarks/long_context.py longest --bytes 5_000_000   # one step, Mamba-2 on top
    python benchmarks/long_context.py longest --bytes 5_000_000 --top transformer
    python benchmarks/long_context.py eval --bytes 10_000_000 --width 64   # `mblm eval` of a file

Each part adds its figures to the file given by `--json`.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side import ROOT, machine_line, reference_python, run_worker, side_by_side, write_json

LAYERS = [9, 8, 8]
PLOT = ROOT / "docs" / "long-context.svg"


def build(job: dict[str, Any]) -> Any:
    import torch

    from mblm import MBLM, MambaBlock, MBLMModelConfig, TransformerBlock

    torch.manual_seed(0)
    width, (middle, local) = job["width"], job["inner"]
    transformer = TransformerBlock(
        attn_head_dims=64,
        attn_num_heads=width // 64,
        attn_use_rot_embs=True,
        pos_emb_type="fixed" if job["top"] == "transformer" else None,
    )
    top: Any = transformer
    if job["top"] == "mamba2":
        top = MambaBlock(block_type="mamba2", d_state=128, d_conv=4, expand=2, headdim=64)
    return MBLM(
        MBLMModelConfig(
            num_tokens=257,
            pad_token_id=256,
            hidden_dims=[width] * 3,
            num_layers=job["layers"],
            seq_lens=[max(8192, -(-job["bytes"] // (middle * local))), middle, local],
            block=[top, transformer, transformer],
            **job["settings"],
        )
    ).train()


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


def evaluate_file(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory in MiB of one `mblm eval`, the interpreter and libraries included."""
    threads = str(job["threads"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build({**job, "bytes": job["window"]}).save_pretrained(folder / "model")
        with (folder / "bytes").open("wb") as file:
            for first in range(0, job["bytes"], 2**20):
                file.write(os.urandom(min(2**20, job["bytes"] - first)))
        size = str(job["window"])
        window = ["--length", size, "--stride", size, "--batch-bytes", size, "--json"]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "mblm", "eval", folder / "model", folder / "bytes", *window],
            env=environment,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        pid, peak = 0, 0.0
        while (
            not pid
        ):  # the usage's largest resident set would be this process's where it is larger
            time.sleep(0.1)
            with contextlib.suppress(OSError, StopIteration):
                peak = memory_mib("VmHWM", process.pid)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        scores = json.loads(process.stdout.read())
        process.returncode = os.waitstatus_to_exitcode(status)
    result = {
        **{key: job[key] for key in ("threads", "width", "layers", "bytes", "window")},
        "wall_s": time.perf_counter() - begin,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": peak,
        "bits_per_byte": scores["bits_per_byte"],
    }
    print(
        f"mblm eval: {job['bytes']:,} bytes in windows of {job['window']:,}, "
        f"{result['wall_s']:.0f} s ({result['cpu_s'] / job['bytes'] * 1e6:.0f} us of CPU a byte), "
        f"peak {result['peak_mib']:.0f} MiB, {result['bits_per_byte']:.4f} bits per byte",
        flush=True,
    )
    return result


def memory_mib(name: str, process: int | str = "self") -> float:
    """A process's resident memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def show(name: str, result: dict[str, Any]) -> dict[str, Any]:
    count = result["bytes"]
    print(
        f"{name:>18}: {count:,} bytes, {median(result['wall_s']):.1f} s a step "
        f"({median(result['cpu_s']) / count * 1e6:.0f} us of CPU a byte), peak "
        f"{result['peak_mib']:.0f} MiB, the sequence's {result['sequence_kib_per_byte']:.2f} KiB "
        f"a byte, loss {result['losses'][0]:.4f}",
        flush=True,
    )
    return result


class Runs:
    """The measurements of one call of this program."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments

    def job(self, top: str, inner: list[int], **settings: Any) -> dict[str, Any]:
        return {
            "threads": self.arguments.threads,
            "width": self.arguments.width,
            "layers": self.arguments.layers,
            "bytes": self.arguments.bytes,
            "steps": self.arguments.runs,
            "inner": inner,
            "top": top,
            "settings": {"train_checkpoint_chunks": None, **settings},
        }

    def ours(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        return show(name, run_worker(sys.executable, __file__, job))

    def tiled(self, top: str, inner: list[int]) -> dict[str, Any]:
        return self.job(top, inner, tile=self.arguments.tile, checkpoint_global=True)

    def reference(self, inner: list[int]) -> dict[str, Any]:
        chunks = self.arguments.chunks
        job = self.job("transformer", inner, train_checkpoint_chunks=chunks)
        python = reference_python(self.arguments.reference)
        return show(f"reference {chunks}", run_worker(python, __file__, job))

    def memory(self, inner: list[int]) -> dict[str, Any]:
        """Of the sequence and of a quarter of it."""
        whole = self.arguments.bytes
        results: dict[str, Any] = {}
        for self.arguments.bytes in (whole // 4, whole):
            ours = self.ours("in tiles", self.tiled("transformer", inner))
            theirs = self.reference(inner)
            results[f"{self.arguments.bytes} bytes"] = {"in tiles": ours, "reference": theirs}
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

    def longest(self) -> dict[str, Any]:
        return self.ours("in tiles", self.tiled(self.arguments.top, [16, 8]))

    def evaluation(self) -> list[dict[str, Any]]:
        """`mblm eval` of files of random bytes, in windows of the context and in one window."""
        context, results = 2**20, []
        for count in sorted({self.arguments.bytes // 10, self.arguments.bytes}):
            for window in sorted({context, max(context, count)}):
                job = {**self.job("mamba2", [16, 8]), "bytes": count, "window": window}
                results.append(evaluate_file(job))
        return results

    def time(self) -> dict[str, Any]:
        """In turns, so that what else the machine does meets each of them, `--runs` times."""
        inner = [16, 8]
        self.arguments.runs, rounds = 3, self.arguments.runs  # steps of a process
        jobs = {
            "in tiles": self.tiled("transformer", inner),
            "in tiles, no recomputation": self.job("transformer", inner, tile=self.arguments.tile),
            "untiled": self.job("transformer", inner),
        }
        results: dict[str, Any] = {name: [] for name in (*jobs, "reference")}
        for _ in range(rounds):
            for name, job in jobs.items():
                results[name].append(self.ours(name, job))
            if self.arguments.with_reference:
                results["reference"].append(self.reference(inner))
        times = {
            name: median([seconds for run in runs for seconds in run["cpu_s"]])
            for name, runs in results.items()
            if runs
        }
        for name, seconds in times.items():
            for other in times.keys() & {"untiled", "reference"}:
                print(f"{name}: {seconds / times[other]:.2f} of the CPU time of {other}")
        return {name: runs for name, runs in results.items() if runs}

    def curve(self) -> list[dict[str, Any]]:
        points = []
        for count in (2**16, 2**18, 2**20, 5_000_000):
            if count <= self.arguments.bytes:
                job = {**self.tiled("mamba2", [16, 8]), "bytes": count}
                points.append(self.ours("in tiles", job))
        return points


def plot(points: list[dict[str, Any]]) -> str:
    """An SVG of CPU time per byte over the sequence's length, a logarithmic axis."""
    import math

    width, height, left, bottom = 560, 300, 60, 250
    cost = [median(p["cpu_s"]) / p["bytes"] * 1e6 for p in points]
    logs = [math.log2(p["bytes"]) for p in points]
    span, top = (logs[-1] - logs[0]) or 1, max(cost) * 1.25
    xs = [left + (log - logs[0]) / span * (width - left - 40) for log in logs]
    ys = [bottom - c / top * (bottom - 30) for c in cost]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{bottom}H{width - 20}" fill="none" stroke="#444"/>',
        f'<text x="{left - 45}" y="14">CPU time of a training step, microseconds per byte</text>',
        f'<text x="{width / 2 - 60}" y="{height - 8}">bytes in the sequence</text>',
        '<polyline fill="none" stroke="#1f6fb4" stroke-width="2" points="'
        + " ".join(f"{x:.0f},{y:.0f}" for x, y in zip(xs, ys, strict=True))
        + '"/>',
        f'<text x="{left - 14}" y="{bottom}">0</text>',
    ]
    for point, value, x, y in zip(points, cost, xs, ys, strict=True):
        parts += [
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="#1f6fb4"/>',
            f'<text x="{x - 10:.0f}" y="{y - 10:.0f}">{value:.0f}</text>',
            f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{point["bytes"]:,}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    options = side_by_side(__doc__)
    parts = ["memory", "shape", "time", "curve", "longest", "eval"]
    options.add_argument("part", nargs="?", choices=parts, default="memory")
    options.add_argument("--bytes", type=int, default=131_072, help="bytes of a sequence")
    options.add_argument("--width", type=int, default=256, help="width of all stages")
    options.add_argument(
        "--layers", type=int, nargs=3, default=LAYERS, help="layers of the three stages"
    )
    options.add_argument(
        "--top", choices=["mamba2", "transformer"], default="mamba2", help="stage 1 of `longest`"
    )
    options.add_argument("--tile", type=int, default=512, help="positions of a tile")
    options.add_argument(
        "--chunks", type=int, nargs=2, default=[10, 20], help="the reference's checkpoint chunks"
    )
    options.add_argument(
        "--mapped",
        action="store_true",
        help="have glibc map large blocks, not take them from heaps",
    )
    options.add_argument(
        "--with-reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have `time` run the reference, too",
    )
    options.set_defaults(runs=1)
    arguments = options.parse_args()
    if arguments.mapped:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # of the processes started from here
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    figures: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        figures = json.loads(Path(arguments.json).read_text())
    print(machine_line(arguments.threads))
    runs = Runs(arguments)
    results: Any = {
        "memory": lambda: runs.memory([16, 8]),
        "shape": lambda: runs.memory([200, 25]),
        "time": runs.time,
        "curve": runs.curve,
        "longest": runs.longest,
        "eval": runs.evaluation,
    }[arguments.part]()
    if arguments.part == "curve":
        PLOT.write_text(plot(results))
    part = arguments.part
    if part == "longest":
        part = f"longest, {arguments.top}"
    if arguments.mapped:
        part = f"{part}, mapped"
    figures[part] = {"machine": machine_line(arguments.threads), "results": results}
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
