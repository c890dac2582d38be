"""Decoding on a GPU, rung by rung, against the floor that memory sets; weights in bfloat16.

The rungs: PyTorch on the whole sequence for every byte, as the published release does; with a
cache (its weights in float32); with this package's fused kernels as CUDA graphs; with kernels that
begin while the ones before them end; and so for prompts of different lengths. All are in one
process, on the same weights, for one sequence and for 64.

The floor is the time to read the weights that a byte needs (see decode.py) at the bandwidth of a
sum over a large buffer, measured in the same run. Times are medians of several runs, after one that
is not counted.

    python benchmarks/gpu_decode.py [--json FILE] [--quick]

--quick takes a tiny model, on the CPU where there is no GPU: to try this script.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from decode import MODELS, build, bytes_read
from side_by_side import write_json

from mblm import MBLM
from mblm.inference import session as session_module
from mblm.inference.session import Session
from mblm.inference.torch_cache import TorchCache

NAMES = ["quickstart, Transformer/Transformer", "published 2D, 25 Mamba-2 + 21 Transformer"]
QUICK = ["small, 2 + 2 Transformer, width 128"]
PROMPT = 64
BANDWIDTH_BYTES = 1 << 30


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], runs: int) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(1 + runs):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def bandwidth(device: str, quick: bool) -> float:
    """Bytes per second of a sum over a buffer."""
    buffer = torch.ones((BANDWIDTH_BYTES >> (10 if quick else 0)) // 4, device=device)
    return buffer.numel() * 4 / seconds(buffer.sum, 9)


@contextlib.contextmanager
def rung(dependent: bool) -> Iterator[None]:
    """Sessions decode so far up the ladder."""
    torch.ops.mblm.set_dependent_launches(dependent)
    try:
        yield
    finally:
        torch.ops.mblm.set_dependent_launches(True)


def per_byte(model: MBLM, batch: int, count: int, runs: int, *, is_ragged: bool = False) -> float:
    """Seconds for a byte of every sequence, in a session that goes on."""
    session = Session(model, batch, weights="bfloat16")
    session.feed([bytes(PROMPT - (row if is_ragged else 0)) for row in range(batch)])
    session.generate(3 * model.seq_lens[-1])  # graphs come with the second use
    return seconds(lambda: session.generate(count), runs) / count


def ladder(model: MBLM, device: str, batch: int, quick: bool) -> dict[str, float]:
    """Seconds per byte of all sequences, by rung."""
    runs, few, many = (1, 8, 16) if quick else (3, 16, 256)
    ids = torch.zeros(batch, PROMPT, dtype=torch.long, device=device)

    @torch.inference_mode()
    def without_cache() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            model(ids)

    figures = {"PyTorch, without a cache": seconds(without_cache, runs)}
    with patch.object(session_module, "cache_for", lambda model, weights: TorchCache(model)):
        figures["PyTorch, with a cache"] = per_byte(model, batch, few, runs)
    for name, dependent in {"graphs": False, "dependent": True}.items():
        with rung(dependent):
            figures[name] = per_byte(model, batch, many, runs)
    if batch > 1:
        figures["dependent, ragged"] = per_byte(model, batch, many, runs, is_ragged=True)
    return figures


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write all figures to this file")
    options.add_argument("--quick", action="store_true", help="a tiny model, to try this script")
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        sys.exit("no GPU: only --quick runs on the CPU")
    name_of_device = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = bandwidth(device, arguments.quick)
    print(f"{name_of_device}, torch {torch.__version__}, reads {rate / 1e9:.0f} GB/s")
    results: dict[str, Any] = {"device": name_of_device, "torch": torch.__version__}
    results["bytes_per_second"] = rate
    print(f"{'model':44} {'batch':>5}  {'rung':26} {'bytes/s':>10}  of the floor")
    for name in QUICK if arguments.quick else NAMES:
        with torch.device(device):
            model = build(*MODELS[name])
        floor = bytes_read(model, "bfloat16") / rate
        for batch in (1, 64):
            figures = ladder(model, device, batch, arguments.quick)
            results[f"{name}, batch {batch}"] = {"floor": floor, "seconds_per_byte": figures}
            for step, value in figures.items():
                print(
                    f"{name:44} {batch:>5}  {step:26} {batch / value:>10.1f}  {floor / value:.3f}",
                    flush=True,
                )
        del model
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
