"""Decoding beside llama.cpp, on models whose tokens read as many weights: fractions of bandwidth.

Ours is the quickstart model, and one with a local stage of 35 layers; theirs is a Llama of the same
width and about as many weights per token, random as ours. Batch 1, the same threads, run in turns.
The bandwidth is that of a buffer of as many bytes, measured beside each pair of runs.
llama.cpp comes as `llama-cpp-python`, in an environment of its own:

    python -m venv build/peer && build/peer/bin/pip install llama-cpp-python gguf
    python benchmarks/peer.py
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decode import BYTES, build, bytes_read, measure
from side_by_side import ROOT, new_figures, parser, positive, spread, write_json

import mblm

WIDTH, SEQ_LENS = 1024, [1024, 8]
MODELS = {"quickstart": [5, 5], "35 local layers": [5, 35]}
# Ours to theirs; Q8_0 has a scale for every 32 weights, ours one for every output row.
TYPES = {"float32": ["F32"], "bfloat16": ["BF16", "F16"], "int8": ["Q8_0"]}


def llama_of(weights: int) -> dict[str, int]:
    """Layers and feed-forward width of a Llama that reads about so many weights per token."""
    layers = round(weights / (8 * WIDTH**2))
    attention, logits = 4 * WIDTH**2, 256 * WIDTH
    feed_forward = ((weights - logits) / layers - attention) / (3 * WIDTH)
    return {"width": WIDTH, "layers": layers, "feed_forward": 32 * round(feed_forward / 32)}


@contextmanager
def peer(python: Path, job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Callable[[], float]]]:
    """A llama.cpp process: its facts, and a function that decodes and returns seconds per token."""
    command = [python, Path(__file__).with_name("peer_llama.py"), json.dumps(job)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def answer() -> Any:
            line = process.stdout.readline()
            if not line:
                sys.exit("llama.cpp failed; its message is above")
            return json.loads(line)

        def decode() -> float:
            print(file=process.stdin, flush=True)
            return answer()

        yield answer(), decode
        process.stdin.close()


def compare(
    model: mblm.MBLM, weights: str, their_type: str, threads: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Seconds per byte and per token in turns, with the bandwidth beside each pair."""
    job = llama_of(bytes_read(model, "float32") // 4)
    job |= {"type": their_type, "threads": threads, "count": arguments.count}
    ours, theirs, bandwidths = [], [], []
    with peer(arguments.python, job) as (facts, decode):
        for _ in range(arguments.runs):
            result = measure(model, weights, 1, arguments.count)
            bandwidths.append(result["bytes"] / result["floor"][0])
            ours += result["seconds"]
            theirs.append(decode())
    return {
        "peer": facts | job,
        "bandwidth": bandwidths,
        "mblm": {"bytes": result["bytes"], "seconds": ours},
        "llama.cpp": {"bytes": facts["bytes"], "seconds": theirs},
    }


def report(name: str, threads: int, weights: str, result: dict[str, Any]) -> None:
    """Two lines of the table, and the ratio of the fractions."""
    fractions = {}
    for side, kind in (("mblm", weights), ("llama.cpp", result["peer"]["type"])):
        size, seconds = result[side]["bytes"], result[side]["seconds"]
        runs = zip(seconds, result["bandwidth"], strict=True)
        fractions[side] = [size / s / bandwidth for s, bandwidth in runs]
        print(
            f"{name:16}  {threads:>7}  {side:>9}  {kind:>8}  {size / 1e6:>8.1f}  "
            f"{1 / median(seconds):>8.1f}  {size / median(seconds) / 1e9:>5.1f}  "
            f"{spread(fractions[side], '.2f')}"
        )
    ratios = [a / b for a, b in zip(fractions["mblm"], fractions["llama.cpp"], strict=True)]
    print(f"{'':16}  fraction over fraction: {spread(ratios, '.2f')}", flush=True)


def main() -> None:
    options = parser(__doc__, runs=5, threads=[os.cpu_count() or 1, 1])
    options.add_argument("--count", type=positive, default=32, help="bytes or tokens of a run")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--weights", nargs="+", choices=BYTES, default=list(BYTES))
    options.add_argument(
        "--peer", type=Path, default=ROOT / "build" / "peer", help="environment of the peer"
    )
    arguments = options.parse_args()
    arguments.python = arguments.peer / "bin" / "python"
    if not arguments.python.exists():
        options.error(f"there is no {arguments.python}: see above how the environment is made")
    figures = new_figures(arguments)
    print("a byte of mblm's is compared with a token of llama.cpp's")
    print("model             threads       side   weights   MB each  a second   GB/s  of bandwidth")
    facts = {}
    for name in arguments.models:
        model = build(["t", "t"], WIDTH, MODELS[name], SEQ_LENS)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for weights in arguments.weights:
                for their_type in TYPES[weights]:
                    result = compare(model, weights, their_type, threads, arguments)
                    report(name, threads, weights, result)
                    figures[f"{name}, {threads} threads, {weights}, {their_type}"] = result
                    facts = result["peer"]
        del model
    print(f"llama-cpp-python {facts['version']}: {facts['system']}")
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
