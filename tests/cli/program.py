"""`mblm` as a program: in this process or in one of its own, and what it gives."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import mblm
from mblm import MBLM

COUNT = 12  # bytes that a test generates


class Result(NamedTuple):
    status: int
    out: bytes
    err: str

    @property
    def error(self) -> str:
        """The error, which is one line, and all there is."""
        assert self.out == b""
        assert self.err.startswith("mblm: error: ") and self.err.count("\n") == 1, self.err
        return self.err


Run = Callable[..., Result]


def expected(model: MBLM, prompt: bytes = b"", **arguments: object) -> bytes:
    """What `MBLM.generate` gives after the prompt."""
    prime = torch.tensor(list(prompt), dtype=torch.long)
    arguments = {"filter_thres": 0.9, "seed": 1, "num_tokens_to_generate": COUNT} | arguments
    ids = model.generate(prime, enable_progress=False, **arguments)
    return bytes(i for i in ids[len(prompt) :].tolist() if i < 256)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mblm", *map(str, args)]


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(mblm.__file__).parents[1]),
    "PYTHONWARNINGS": "ignore",
}
