"""All generators are seeded, or none on bad input; their states are kept."""

import random

import numpy as np
import pytest
import torch

from mblm.utils.seed import get_rng, seed_everything, set_rng


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, np.int64(7), torch.tensor(7)])
def test_the_same_seed_draws_the_same_numbers(seed):
    seed_everything(seed)
    first = draw()
    seed_everything(int(seed))
    assert draw() == first
    assert draw() != first


@pytest.mark.parametrize(
    "seed, error", [(-1, ValueError), (2**32, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_bad_seed_changes_no_generator(seed, error):
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with pytest.raises(error, match="seed"):
        seed_everything(seed)
    assert draw() == expected


def test_all_generators_are_kept_as_plain_values(tmp_path):
    torch.save(get_rng(), tmp_path / "rng.pt")
    drawn = [torch.rand(2).tolist(), np.random.rand(), random.random(), random.gauss(0, 1)]
    set_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [torch.rand(2).tolist(), np.random.rand(), random.random(), random.gauss(0, 1)] == drawn
