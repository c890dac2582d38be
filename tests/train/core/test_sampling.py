"""Samplers: every sample once, by seed and epoch alone, from anywhere, by each worker its own."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mblm.train.core.rng import get_rng, set_rng
from mblm.train.core.sampling import EpochSampler, ShardedBatches, TrainBatches


def order(seed=1, epoch=0, start=0, size=200_000):
    sampler = EpochSampler(range(size), shuffle=True, seed=seed)
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


def test_shuffles_by_seed_and_epoch_alone():
    first = order()
    torch.manual_seed(99)
    assert order() == first
    assert sorted(first) == list(range(200_000))
    assert first != order(seed=2)
    assert first != order(epoch=1)
    assert order(start=70_001) == first[70_001:]


def test_starts_late_once():
    sampler = EpochSampler(range(5), shuffle=False, seed=0)
    sampler.start = 3
    assert [list(sampler), list(sampler)] == [[3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("size", [1, 7, 8, 12])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_share_the_batches(size, workers):
    shards = [
        ShardedBatches(
            EpochSampler(range(size), shuffle=True, seed=3), 3, rank=rank, world_size=workers
        )
        for rank in range(workers)
    ]
    batches = [list(shard) for shard in shards]
    assert [len(shard) for shard in shards] == list(map(len, batches))
    whole = list(
        torch.utils.data.BatchSampler(EpochSampler(range(size), shuffle=True, seed=3), 3, False)
    )
    assert shards[0].total == len(whole)
    for rank, of_worker in enumerate(batches):
        assert of_worker == whole[rank::workers]


def test_another_loader_is_replayed_and_the_generators_stay():
    batches = TrainBatches(DataLoader(list(range(20)), batch_size=2, shuffle=True))
    whole = [batch.tolist() for batch in batches]
    now = torch.get_rng_state()
    assert [batch.tolist() for batch in batches.iter_from(4)] == whole[4:]
    assert torch.equal(torch.get_rng_state(), now)


def test_all_generators_are_kept_as_plain_values(tmp_path):
    torch.save(get_rng(), tmp_path / "rng.pt")
    drawn = [torch.rand(2).tolist(), np.random.rand(), random.random(), random.gauss(0, 1)]
    set_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [torch.rand(2).tolist(), np.random.rand(), random.random(), random.gauss(0, 1)] == drawn
