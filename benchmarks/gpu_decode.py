"""Decoding on a GPU, rung by rung, against the floor that memory sets; weights in bfloat16.

The rungs: PyTorch on the whole sequence for every byte, as the published release does; with a
cache (its weights in float32); this package's engine, its kernels launched one by one; by graphs;
and so that they begin while the ones before them end, as they always do; and, of 64 rows, so for
prompts of different lengths. All have the same weights, for one row and for 64. The lower rungs of
the engine, of one row alone, are processes of their own, whose calls of CUDA's runtime are changed
by gpu_rungs.cpp; they are left out where there is no nvcc to compile it.

A byte's time is the slope between two runs of different lengths, by events on the GPU: what a call
costs beside its bytes is not in it. The rows have bytes enough from the beginning, so that nothing
grows meanwhile. The floor is the time to move what a byte needs, its weights and states (see
gpu_model.py), at the bandwidth of a large copy in the same run. Beside it stands what that model
predicts at this bandwidth.

    python benchmarks/gpu_decode.py [--json FILE] [--quick]

--quick takes a tiny model, on the CPU where there is no GPU: to try this script.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from decode import MODELS, build, config_of
from gpu_model import DESIGNS, DEVICES, predict
from side_by_side import json_file, write_json
from torch.utils.cpp_extension import CUDA_HOME

from mblm import MBLM
from mblm.inference import session as session_module
from mblm.inference.session import Session
from mblm.inference.torch_cache import TorchCache

NAMES = ["quickstart, Transformer/Transformer", "published 2D, 25 Mamba-2 + 21 Transformer"]
QUICK = ["small, 2 + 2 Transformer, width 128"]
BUILT = next(design for design in DESIGNS if design.name == "four phases, L2 prefetch")
# A little more than half of a power of two: memory that doubles has room for the runs, too.
PROMPT = 1088
COPIED = 4 << 30
LOWER_RUNGS = {"engine, one by one": [], "engine, by graphs": ["-DGRAPHS"]}  # flags for nvcc


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, between events on the GPU."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def middle(call: Callable[[], Any], runs: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    return median([seconds(call) for _ in range(1 + runs)][1:])


def bandwidth(device: str, quick: bool) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones((COPIED >> (10 if quick else 0)) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / middle(lambda: target.copy_(source), 9)


def per_byte(model: MBLM, lengths: list[int], counts: tuple[int, int]) -> float:
    """Seconds for a byte of every row, after prompts of these lengths."""
    session = Session(model, len(lengths), weights="bfloat16")
    session.feed([bytes(length) for length in lengths])
    few, many = (middle(lambda n=n: session.generate(n), 3) for n in counts)
    return (many - few) / (counts[1] - counts[0])


def sizes(quick: bool) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Bytes of a prompt, and of a short and a long measurement: patches of eight bytes."""
    return (72, (8, 16), (8, 16)) if quick else (PROMPT, (8, 16), (24, 192))


def ladder(model: MBLM, device: str, batch: int, quick: bool) -> Iterator[tuple[str, float]]:
    """Seconds per byte of all rows, by rung."""
    prompt, short, long = sizes(quick)
    ids = torch.zeros(batch, prompt, dtype=torch.long, device=device)

    @torch.inference_mode()
    def without_cache() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            model(ids)

    yield "engine", per_byte(model, [prompt] * batch, long)
    if batch > 1:
        yield "engine, ragged", per_byte(model, [prompt - row for row in range(batch)], long)
    with patch.object(session_module, "cache_for", lambda model, weights: TorchCache(model)):
        yield "PyTorch, with a cache", per_byte(model, [prompt] * batch, short)
    yield "PyTorch, without a cache", middle(without_cache, 3)


def lower_rungs(quick: bool) -> Iterator[tuple[str, str, float]]:
    """Rung, model and seconds per byte of the engine in other processes."""
    source = Path(__file__).with_name("gpu_rungs.cpp")
    nvcc = Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
    if not nvcc.exists():
        return print("LEFT OUT: lower rungs of the engine, for lack of nvcc", flush=True)
    worker = [sys.executable, __file__, "--worker", *["--quick"] * quick]
    with tempfile.TemporaryDirectory() as folder:
        for rung, flags in LOWER_RUNGS.items():
            library = Path(folder, "rungs.so")
            subprocess.run([*compile_rung(nvcc, source), *flags, "-o", library], check=True)
            environment = {**os.environ, "LD_PRELOAD": str(library)}
            with subprocess.Popen(
                worker, env=environment, stdout=subprocess.PIPE, text=True
            ) as process:
                for line in process.stdout or []:
                    yield rung, *json.loads(line)
            if process.returncode:
                print(f"{rung}: failed ({process.returncode})", flush=True)


def work(names: list[str], device: str, quick: bool) -> None:
    """Print seconds per byte of one row in the engine, as JSON."""
    prompt, _, long = sizes(quick)
    for name in names:
        print(json.dumps([name, per_byte(built(name, device), [prompt], long)]), flush=True)


def compile_rung(nvcc: Path, source: Path) -> list[str]:
    major = (torch.version.cuda or "13").split(".")[0]
    command = [str(nvcc), "-shared", "-Xcompiler", "-fPIC", "-cudart", "none"]
    return [*command, f"-DCUDA_MAJOR={major}", str(source)]


def built(name: str, device: str) -> MBLM:
    torch.manual_seed(0)
    with torch.device(device):
        return build(*MODELS[name])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=json_file, help="write all figures to this file")
    options.add_argument("--quick", action="store_true", help="a tiny model, to try this script")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        sys.exit("no GPU: only --quick runs on the CPU")
    names = QUICK if arguments.quick else NAMES
    if arguments.worker:
        return work(names, device, arguments.quick)
    name_of_device = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = bandwidth(device, arguments.quick)
    print(f"{name_of_device}, torch {torch.__version__}, copies {rate / 1e9:.0f} GB/s")
    results: dict[str, Any] = {"device": name_of_device, "torch": torch.__version__}
    results["bytes_per_second"] = rate

    def tell(rung: str, name: str, batch: int, value: float) -> None:
        told = results[f"{name}, {batch} rows"]
        told["seconds_per_byte"][rung] = value
        write_json(arguments.json, results)  # now, lest a time limit take it away
        floor, fraction = (told["predicted"][key] for key in ("floor", "fraction"))
        print(
            f"{name:44} {batch:>4}  {rung:26} {batch / value:>10.1f}  {floor / value:.3f}"
            + f", predicted {fraction:.3f}" * (rung == "engine"),
            flush=True,
        )

    print(f"{'model':44} {'rows':>4}  {'rung':26} {'bytes/s':>10}  of the floor")
    here = replace(DEVICES[0], bandwidth=rate)
    for name in names:
        model = built(name, device)
        for batch in (1, 2 if arguments.quick else 64):
            predicted = predict(config_of(*MODELS[name]), here, BUILT, batch)
            results[f"{name}, {batch} rows"] = {"predicted": predicted, "seconds_per_byte": {}}
            for rung, value in ladder(model, device, batch, arguments.quick):
                tell(rung, name, batch, value)
        del model
    for rung, name, value in lower_rungs(arguments.quick):
        tell(rung, name, 1, value)


if __name__ == "__main__":
    main()
