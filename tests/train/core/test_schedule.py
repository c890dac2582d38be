"""plan_run: the batches that reach the target, and the points spread over them."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.train.core.schedule import plan_run, spread

from . import jobs


def plan(world_size=1, start=0, **fields):
    cfg = jobs.config("out", **fields)
    return plan_run(cfg.train, cfg.io, input_seq_len=8, world_size=world_size, start=start)


def test_counts_sequences_or_their_elements():
    batches = plan(target_elements=100, target_elements_strategy="batch", batch_size=3)
    assert (batches.batches, batches.elements_per_batch) == (34, 3)
    elements = plan(target_elements=100, target_elements_strategy="sequence", batch_size=3)
    assert (elements.batches, elements.elements_per_batch) == (5, 24)


def test_a_step_takes_several_batches():
    assert plan(target_elements=100, batch_size=10, gradient_accumulate_every=4).gradient_steps == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 9), st.integers(1, 8))
def test_the_target_is_a_lower_bound_for_all_workers_together(target, batch_size, workers):
    reached = plan(workers, target_elements=target * workers, batch_size=batch_size)
    assert reached.batches == math.ceil(target / batch_size)


def test_points_are_spread_over_the_batches_of_this_run():
    assert spread(10, 9, 3) == {10, 14, 18}
    assert spread(10, 2, 5) == {10, 11}
    assert spread(3, 4, 1) == {3}
    assert spread(3, 4, 0) == frozenset()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(2, 50))
def test_first_and_last_are_points_and_none_is_outside(start, batches, amount):
    points = spread(start, batches, amount)
    assert {start, start + batches - 1} <= points
    assert points <= set(range(start, start + batches))
