"""Seed every random number generator a program may draw from."""

import random
from typing import SupportsIndex

import numpy as np
import torch

from mblm.utils.checks import check_integer


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
