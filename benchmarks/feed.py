"""Feeding a few bytes: positions in compiled code against the same layers in PyTorch.

A session that stands in the middle of a text takes in the next 1 to 64 bytes; each time a fork of
it, in turns natively and in PyTorch with this package's operators and the float32 weights, which is
also what longer prompts take. One stage alone has as many positions as bytes; of two stages, the
local one takes in the last patch alone.

    python benchmarks/feed.py
"""

from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from decode import build, clock
from side_by_side import new_figures, parser, positive, spread, write_json

from mblm.inference import session as session_module
from mblm.inference.session import Session
from mblm.inference.torch_cache import TorchCache
from mblm.ops.packing import WEIGHT_TYPES

COUNTS = (1, 2, 4, 8, 16, 64)
BEFORE = 64  # bytes fed before
# Blocks from the top, width, layers, seq_lens.
MODELS: dict[str, tuple[list[str], int, list[int], list[int]]] = {
    "quickstart, Transformer/Transformer": (["t", "t"], 1024, [5, 5], [1024, 8]),
    "Transformer, 5 layers": (["t"], 1024, [5], [8192]),
    "Mamba-2, 5 layers": (["mamba2"], 1024, [5], [8192]),
    "small, Transformer, 2 layers, width 128": (["t"], 128, [2], [8192]),
}


def in_pytorch(model: Any) -> Session:
    """A session of which every position goes through PyTorch's layers."""
    with patch.object(session_module, "cache_for", lambda model, weights: TorchCache(model)):
        return Session(model)


def measure(sessions: dict[str, Session], count: int, runs: int) -> dict[str, list[float]]:
    """Seconds until forks of sessions have taken in ``count`` bytes, in turns."""
    ids = torch.randint(0, 256, (1, count))
    seconds: dict[str, list[float]] = {key: [] for key in sessions}
    for _ in range(1 + runs):
        for key, session in sessions.items():
            fork = session.fork()
            seconds[key].append(clock(lambda fork=fork: fork.feed(ids).logits()))
    return {key: values[1:] for key, values in seconds.items()}


def main() -> None:
    options = parser(__doc__, runs=7)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--weights", nargs="+", choices=WEIGHT_TYPES, default=list(WEIGHT_TYPES))
    options.add_argument(
        "--counts", type=positive, nargs="+", default=list(COUNTS), help="bytes fed"
    )
    arguments = options.parse_args()
    figures = new_figures(arguments)
    for name in arguments.models:
        model = build(*MODELS[name])
        before = torch.randint(0, 256, (BEFORE,))
        pytorch_session = in_pytorch(model).feed(before)
        for weights in arguments.weights:
            native_session = Session(model, weights=weights).feed(before)
            sessions = {"native": native_session, "pytorch": pytorch_session}
            print(f"{name}, {weights}")
            for count in arguments.counts:
                result = measure(sessions, count, arguments.runs)
                native, pytorch = (median(result[key]) for key in ("native", "pytorch"))
                ratios = [b / a for a, b in zip(result["native"], result["pytorch"], strict=True)]
                print(
                    f"  {count:>4} bytes: native {1e3 * native:8.2f} ms, "
                    f"PyTorch {1e3 * pytorch:8.2f} ms, {spread(ratios, '.2f')} times as fast",
                    flush=True,
                )
                figures[f"{name}, {weights}, {count} bytes"] = result
        del model
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
