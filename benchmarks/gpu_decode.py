"""Decoding on a GPU, rung by rung, against the floor that memory sets; weights in bfloat16.

The rungs: PyTorch on the whole sequence for every byte, as the published release does; with a
cache (its weights in float32); this package's engine, whose kernels are launched by graphs and
begin while the ones before them end; and, of 64 rows, so for prompts of different lengths. All are
in one process, on the same weights, for one row and for 64.

A byte's time is the slope between two runs of different lengths, by events on the GPU: what a call
costs beside its bytes is not in it. The rows have bytes enough from the beginning, so that nothing
grows meanwhile. The floor is the time to move what a byte needs, its weights and states (see
gpu_model.py), at the bandwidth of a large copy in the same run. Beside it stands what that model
predicts at this bandwidth.

    python benchmarks/gpu_decode.py [--json FILE] [--quick]

--quick takes a tiny model, on the CPU where there is no GPU: to try this script.
"""

import argparse
import sys
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
from side_by_side import write_json

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


def ladder(model: MBLM, device: str, batch: int, quick: bool) -> Iterator[tuple[str, float]]:
    """Seconds per byte of all rows, by rung. The counts are patches of eight bytes."""
    prompt, short, long = (72, (8, 16), (8, 16)) if quick else (PROMPT, (8, 16), (24, 192))
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
    print(f"{name_of_device}, torch {torch.__version__}, copies {rate / 1e9:.0f} GB/s")
    results: dict[str, Any] = {"device": name_of_device, "torch": torch.__version__}
    results["bytes_per_second"] = rate
    print(f"{'model':44} {'rows':>4}  {'rung':26} {'bytes/s':>10}  of the floor")
    for name in QUICK if arguments.quick else NAMES:
        with torch.device(device):
            model = build(*MODELS[name])
        for batch in (1, 2 if arguments.quick else 64):
            here = replace(DEVICES[0], bandwidth=rate)
            predicted = predict(config_of(*MODELS[name]), here, BUILT, batch)
            floor = predicted["floor"]
            told = results[f"{name}, {batch} rows"] = {"predicted": predicted}
            figures = told["seconds_per_byte"] = {}
            for step, value in ladder(model, device, batch, arguments.quick):
                figures[step] = value
                write_json(arguments.json, results)  # now, lest a time limit take it away
                print(
                    f"{name:44} {batch:>4}  {step:26} {batch / value:>10.1f}  {floor / value:.3f}"
                    + f", predicted {predicted['fraction']:.3f}" * (step == "engine"),
                    flush=True,
                )
        del model


if __name__ == "__main__":
    main()
