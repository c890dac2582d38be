"""Samplers: every sample once, by seed and epoch alone, from anywhere, by each worker its own."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mblm.data.datasets import DistributedDataset
from mblm.train.core.sampling import EpochBatches, TrainBatches


def order(size=20, epoch=0, start=0, seed=1, shuffle=True, **kwargs):
    batches = EpochBatches(range(size), 3, shuffle=shuffle, seed=seed, **kwargs)
    batches.begin(epoch, start)
    first = list(batches)
    assert len(first) == len(batches) - start
    return first


def test_shuffles_by_seed_and_epoch_alone():
    first = order()
    torch.manual_seed(99)
    assert order() == first
    assert sorted(index for batch in first for index in batch) == list(range(20))
    assert first != order(seed=2)
    assert first != order(epoch=1)
    assert order(start=2) == first[2:]


def test_in_order_the_last_may_be_short_or_left_out():
    assert order(5, shuffle=False) == [[0, 1, 2], [3, 4]]
    assert order(5, shuffle=False, drop_last=True) == [[0, 1, 2]]
    assert order(6, shuffle=False, drop_last=True) == [[0, 1, 2], [3, 4, 5]]


def test_starts_late_once():
    batches = EpochBatches(range(5), 2, shuffle=False, seed=0)
    batches.begin(0, 2)
    assert [list(batches), list(batches)] == [[[4]], [[0, 1], [2, 3], [4]]]


@pytest.mark.parametrize("size", [1, 7, 8, 12])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_share_the_batches(size, workers):
    whole = order(size)
    for rank in range(workers):
        assert order(size, rank=rank, world_size=workers) == whole[rank::workers]


def test_another_loader_is_replayed_and_the_generators_stay():
    batches = TrainBatches(DataLoader(list(range(20)), batch_size=2, shuffle=True))
    whole = [batch.tolist() for batch in batches]
    now = torch.get_rng_state()
    assert [batch.tolist() for batch in batches.iter_from(4)] == whole[4:]
    assert torch.equal(torch.get_rng_state(), now)


class Drawn(DistributedDataset):
    """Samples of their index, the dataset's offset and a number drawn from each generator."""

    def __init__(self):
        super().__init__(40, True, seq_len=2, worker_id=0, num_workers=1)

    def get_sample(self, from_idx):
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([from_idx, self.sample_offset, *drawn], dtype=torch.float64)


def drawn_in_workers(epochs, start=0, seed=7, workers=2, **kwargs):
    """The batches that loaders' workers give in some epochs, the first from ``start`` on."""
    dataset = Drawn()
    batches = EpochBatches(dataset, 4, shuffle=True, seed=seed, drop_last=True)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        generator=batches.generator,
        num_workers=workers,
        **kwargs,
    )
    train, given = TrainBatches(loader), []
    for epoch in epochs:
        train.epoch = epoch
        dataset.offset_to(epoch)
        given += [batch.tolist() for batch in train.iter_from(start)]
        start = 0
    return given


def test_what_workers_draw_depends_on_seed_epoch_and_batch_alone():
    whole = drawn_in_workers([0, 1])
    assert len(whole) == 9  # of 20 samples, and of 19
    assert drawn_in_workers([0], start=3) + drawn_in_workers([1], workers=1) == whole[3:]
    numbers = [number for batch in whole for sample in batch for number in sample[2:]]
    assert len(set(numbers)) == len(numbers)
    assert not {sample[2] for batch in drawn_in_workers([0], seed=8) for sample in batch} & {
        *numbers
    }


def test_workers_that_stay_see_the_offset_of_every_epoch():
    assert drawn_in_workers([0, 1], persistent_workers=True) == drawn_in_workers([0, 1])
    assert drawn_in_workers([1], persistent_workers=True)[0][0][1] == 1


def test_workers_of_another_loader_may_not_stay():
    loader = DataLoader(Drawn(), batch_size=2, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="get_train_dataloader: with persistent_workers"):
        TrainBatches(loader)


def test_another_loader_is_replayed_with_its_own_generator():
    def batches():
        generator = torch.Generator().manual_seed(3)
        return TrainBatches(
            DataLoader(list(range(20)), batch_size=2, shuffle=True, generator=generator)
        )

    through = batches()
    first, second = ([batch.tolist() for batch in through] for _ in range(2))
    assert first != second
    resumed = batches()
    resumed.epoch_rng = through.epoch_rng
    assert [batch.tolist() for batch in resumed.iter_from(4)] == second[4:]
