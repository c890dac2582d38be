"""Every random number generator a program may draw from: seeded, its state told and set back."""

import random
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch

from mblm.utils.checks import check_integer

Rng: TypeAlias = dict[str, Any]


def seed_everything(seed: SupportsIndex) -> None:
    """Seed the default generators of torch (all devices), numpy and Python.

    Args:
        seed: An integer in [0, 2**32), numpy's range.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is out of range.
    """
    value = check_integer("seed", seed)
    if not 0 <= value < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {value}")
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def get_rng(*own: torch.Generator | None) -> Rng:
    """The states of torch's default generators (CPU, current CUDA device), numpy's and Python's.

    ``own`` are generators beside them, such as a loader's.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "own": [None if generator is None else generator.get_state() for generator in own],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }


def set_rng(rng: Rng, *own: torch.Generator | None) -> None:
    """Set the generators to states that `get_rng` gave."""
    for generator, state in zip(own, rng["own"], strict=False):
        if generator is not None and state is not None:
            generator.set_state(state)
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"])
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
