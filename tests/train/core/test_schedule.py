"""plan_run: the batches that reach the target, and the points spread over them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.train.core.schedule import plan_run, spread
from mblm.train.experiment import load_experiment

from . import jobs

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def plan(world_size=1, start=0, **fields):
    return plan_run(jobs.config("out", **fields), world_size, start)


def test_counts_sequences_or_their_elements():
    batches = plan(target_elements=100, target_elements_strategy="batch", batch_size=3)
    assert (batches.batches, batches.elements_per_batch) == (34, 3)
    elements = plan(target_elements=100, target_elements_strategy="sequence", batch_size=3)
    assert (elements.batches, elements.elements_per_batch) == (5, 24)


def test_the_last_step_has_all_of_its_batches():
    planned = plan(target_elements=100, batch_size=10, gradient_accumulate_every=4)
    assert (planned.batches, planned.gradient_steps, planned.added) == (12, 3, 2)


def test_a_step_of_more_batches_than_the_run_is_refused_with_the_figures():
    with pytest.raises(ValueError, match=r"takes 8 batches, .* 24 are no more than 6 .* 2 workers"):
        plan(2, target_elements=24, batch_size=2, gradient_accumulate_every=8)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_shipped_configurations_are_planned_in_whole_steps(file, workers):
    config = load_experiment(file)
    train = config.train
    planned = plan_run(config, workers)
    assert planned.batches == planned.gradient_steps * train.gradient_accumulate_every
    per_step = planned.elements_per_batch * workers * train.gradient_accumulate_every
    seen = planned.gradient_steps * per_step
    assert train.target_elements <= seen < train.target_elements + per_step
    assert {0, planned.batches - 1} <= planned.validation_points
    assert len(planned.validation_points) == min(config.io.validate_amount, planned.batches)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 9), st.integers(1, 8))
def test_the_target_is_a_lower_bound_for_all_workers_together(target, batch_size, workers):
    batches = plan(workers, target_elements=target, batch_size=batch_size).batches
    assert (batches - 1) * batch_size * workers < target <= batches * batch_size * workers


def test_points_are_spread_over_the_batches_of_this_run():
    assert spread(10, 9, 3) == {10, 14, 18}
    assert spread(10, 2, 5) == {10, 11}
    assert spread(3, 4, 1) == {6}  # what is trained last is validated
    assert spread(3, 4, 0) == frozenset()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**5), st.integers(2, 50))
def test_first_and_last_are_points_and_none_is_outside(start, batches, amount):
    points = spread(start, batches, amount)
    assert {start, start + batches - 1} <= points
    assert points <= set(range(start, start + batches))
    assert len(points) == min(amount, batches)
