"""evaluate: what a batch weighs, and what becomes of one whose loss is not finite."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from mblm.data.dataset.mixture import Mixture
from mblm.data.datasets import DistributedDataset
from mblm.train.core.evaluation import Sources, evaluate
from mblm.train.core.parallel import Workers
from mblm.utils.distributed import ElasticRunVars


class Losses(DistributedDataset):
    """Losses as they are."""

    def __init__(self, values):
        self.values = torch.tensor(values)
        super().__init__(len(values), True, seq_len=1, worker_id=0, num_workers=1)

    def get_sample(self, from_idx):
        return self.values[from_idx]


ALONE = Workers(ElasticRunVars(local_rank=0, world_size=1, is_cuda=False))


def evaluate_losses(losses, weigh=lambda batch: 1, **kwargs):
    loader = DataLoader(torch.tensor(losses), batch_size=1)
    defaults = {"max_batches": None, "in_step": False}
    return evaluate(lambda b: b.squeeze(), weigh, loader, ALONE, **{**defaults, **kwargs})


def test_batches_weigh_as_many_entries_as_have_loss():
    assert evaluate_losses([1.0, 4.0]).loss == 2.5
    assert evaluate_losses([1.0, 4.0], lambda batch: 3 if batch == 1 else 1).loss == 1.75


def test_a_batch_without_entries_weighs_nothing():
    result = evaluate_losses([0.0, 4.0, 6.0], lambda batch: int(batch > 0))
    assert result.loss == 5.0
    assert result.trouble() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_left_out_and_said(value):
    result = evaluate_losses([1.0, value, 3.0, value])
    assert (result.loss, result.left_out) == (2.0, [1, 3])
    assert result.trouble().startswith("2 of 4 batches are left out") and "1, 3" in result.trouble()


def test_where_nothing_counts_there_is_no_loss():
    assert math.isnan(evaluate_losses([math.nan]).loss)
    nothing = evaluate_losses([0.0, 0.0], lambda batch: 0)
    assert math.isnan(nothing.loss)
    assert "no entry of 2 batches has loss" in nothing.trouble()


def test_takes_no_more_than_asked_and_needs_one_batch():
    assert evaluate_losses([1.0, 2.0, 9.0], max_batches=2).loss == 1.5
    with pytest.raises(ValueError, match="no batch to evaluate on"):
        evaluate_losses([])


def test_sources_count_by_their_weights_and_each_has_its_share_of_the_batches():
    losses = {"few": [1.0, 3.0, 99.0], "many": [5.0, math.inf, 99.0, 99.0]}
    parts = {name: Losses(values) for name, values in losses.items()}
    alone = {"seq_len": 1, "worker_id": 0, "num_workers": 1}
    mixture = Mixture(parts, {"few": 0.25, "many": 0.75}, seed=0, **alone)
    sources = Sources(mixture, lambda part: DataLoader(part, batch_size=1))
    result = sources.evaluate(
        lambda b: b.squeeze(), lambda batch: 1, ALONE, max_batches=5, in_step=False
    )
    assert result.of_sources == {"few": 2.0, "many": 5.0}
    assert result.loss == 0.25 * 2 + 0.75 * 5
    assert (result.batches, result.left_out) == (4, [3])


def test_may_be_stopped_between_two_batches():
    checked = []

    def check():
        checked.append(1)
        if len(checked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_losses([1.0, 2.0, 3.0, 4.0], check=check)
    checked.clear()
    assert evaluate_losses([1.0, 2.0], check=check).loss == 1.5  # after the last it is too late
