"""Choosing a byte from logits: what is kept, and which random numbers are drawn."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mblm.inference.plan import Plan
from mblm.model.sampling import gumbel_sample, keep_min_p, keep_top_p, sample, top_k


class TestTopK:
    @pytest.mark.parametrize(
        ("thres", "kept"), [(1.0, 1), (0.95, 1), (0.9, 1), (0.5, 5), (0.31, 6), (0.0, 10)]
    )
    def test_keeps_a_share_and_at_least_one(self, thres: float, kept: int) -> None:
        logits = torch.randn(3, 10)
        out = top_k(logits, thres)
        assert out.isfinite().sum(-1).tolist() == [max(int((1 - thres) * 10), 1)] * 3 == [kept] * 3
        for row, expected in zip(out, logits, strict=True):
            highest = expected.topk(kept).indices
            assert torch.equal(row[highest], expected[highest])

    def test_default_is_half(self) -> None:
        assert top_k(torch.randn(1, 10)).isfinite().sum() == 5


class TestTopP:
    def test_keeps_the_fewest_that_reach_p(self) -> None:
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        for p, kept in ((0.3, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
            assert keep_top_p(logits, p).isfinite().nonzero()[:, 1].tolist() == kept, p

    def test_reaches_p_at_the_temperature(self) -> None:
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        assert keep_top_p(logits, 0.6, temperature=0.1).isfinite().sum() == 1
        assert keep_top_p(logits, 0.6, temperature=100.0).isfinite().sum() == 3

    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.floats(0.01, 1.0))
    @settings(max_examples=100, deadline=None)
    def test_is_the_smallest_such_set(self, values: list[float], p: float) -> None:
        logits = torch.tensor([values])
        kept = keep_top_p(logits, p).isfinite()[0]
        probabilities = logits.softmax(-1)[0].double()
        assert kept.any()
        if (~kept).any():
            assert probabilities[kept].min() >= probabilities[~kept].max()
            assert probabilities[kept].sum() >= p - 1e-6
        smallest = probabilities[kept].min()
        assert probabilities[kept].sum() - smallest < p + 1e-6


class TestMinP:
    def test_keeps_what_is_likely_enough_beside_the_likeliest(self) -> None:
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        for p, kept in ((0.1, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.45, [1, 3]), (1.0, [1])):
            assert keep_min_p(logits, p).isfinite().nonzero()[:, 1].tolist() == kept, p

    def test_at_the_temperature(self) -> None:
        logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
        assert keep_min_p(logits, 0.25, temperature=0.1).isfinite().sum() == 1
        assert keep_min_p(logits, 0.25, temperature=100.0).isfinite().sum() == 4


class TestSample:
    """As a plan says: top_p or else top_k, then min_p, then the noise."""

    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(400, 4)

    @pytest.mark.parametrize(
        ("filters", "kept"),
        [
            ((1.0, 2, 0.0, 0.0), {0, 1}),
            ((1.0, 1, 0.8, 0.0), {0, 1, 2}),
            ((1.0, 3, 0.0, 0.6), {0, 1}),
            ((1.0, 1, 0.95, 0.6), {0, 1}),
            ((1.0, 99, 0.0, 0.0), {0, 1, 2, 3}),
            ((0.0, 99, 1.0, 0.0), {0}),
        ],
    )
    def test_the_order_of_the_filters(self, filters: Any, kept: set[int]) -> None:
        ids = sample(self.logits, torch.rand(400, 4), *filters)
        assert set(ids.tolist()) == kept

    @pytest.mark.parametrize(
        "filters", [(0.0, 1, 0.0, 0.0), (1.0, 2, 0.0, 0.0), (1.0, 1, 0.9, 0.0), (1.0, 3, 0.0, 0.5)]
    )
    def test_nan_counts_as_highest(self, filters: Any) -> None:
        logits = self.logits.clone()
        logits[:, 2] = torch.nan
        assert sample(logits, torch.rand(400, 4), *filters).eq(2).all()


class TestGumbel:
    def test_draws_the_numbers_of_the_contract(self) -> None:
        logits = torch.randn(1, 257)
        torch.manual_seed(7)
        sampled = gumbel_sample(logits, temperature=0.7)
        after = torch.get_rng_state()
        torch.manual_seed(7)
        u = torch.zeros(1, 257).uniform_()
        noise = -torch.log((-torch.log(u.clamp(min=1e-20))).clamp(min=1e-20))
        assert sampled.item() == (logits / 0.7 + noise).argmax().item()
        assert torch.equal(torch.get_rng_state(), after)

    def test_draws_even_where_one_is_left(self) -> None:
        """A greedy step consumes as many random numbers as any other."""
        logits = torch.randn(1, 19)
        states = []
        for thres in (1.0, 0.0):
            torch.manual_seed(7)
            gumbel_sample(top_k(logits, thres))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_never_takes_what_was_filtered_out(self) -> None:
        logits = torch.full((1000, 3), float("-inf"))
        logits[:, 1] = -5.0
        assert gumbel_sample(logits, temperature=10.0).eq(1).all()

    def test_follows_the_probabilities(self) -> None:
        probabilities = torch.tensor([0.1, 0.2, 0.7])
        count = 20_000
        sampled = gumbel_sample(probabilities.log().expand(count, 3))
        share = sampled.bincount(minlength=3) / count
        torch.testing.assert_close(share, probabilities, atol=0.02, rtol=0.0)

    def test_generator_is_drawn_from_instead(self) -> None:
        logits = torch.zeros(1, 100)
        before = torch.get_rng_state()
        drawn = [
            gumbel_sample(logits, generator=torch.Generator().manual_seed(5)) for _ in range(2)
        ]
        assert torch.equal(*drawn)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        assert torch.equal(gumbel_sample(logits), drawn[0])


def sampled(logits: torch.Tensor, **wishes: Any) -> torch.Tensor:
    """Ids ``(B,)`` of logits ``(B, V)``, as a plan says, with numbers of the default generator."""
    numbers = torch.zeros(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return sample(logits, numbers.uniform_(), *Plan(1, **wishes).filters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wishes", [{"top_k": 257}, {"top_p": 0.9}], ids=str)
def test_half_precision_is_sampled_in_float32(dtype: torch.dtype, wishes: dict[str, Any]) -> None:
    logits = torch.randn(200, 257).to(dtype)
    assert torch.equal(sampled(logits), logits.argmax(-1))
    ids = []
    for same in (logits, logits.float()):
        torch.manual_seed(3)
        ids.append(sampled(same, temperature=2.0, **wishes))
    assert torch.equal(*ids)


def test_float64_is_sampled_in_float64() -> None:
    logits = torch.randn(1, 257, dtype=torch.float64)
    torch.manual_seed(3)
    noise = -torch.log(-torch.log(torch.zeros_like(logits).uniform_()))
    torch.manual_seed(3)
    assert sampled(logits, top_k=257).item() == (logits + noise).argmax().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-45, 1e-38, 1e-31])
@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_a_temperature_that_is_all_but_0_is_greedy(
    dtype: torch.dtype, temperature: float, top_p: float
) -> None:
    logits = torch.linspace(90, 110, 21).to(dtype)[torch.stack([torch.randperm(21)] * 9)]
    ids = sampled(logits, temperature=temperature, top_k=21, top_p=top_p)
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(gumbel_sample(logits, temperature), logits.argmax(-1))


def test_the_hottest_takes_nothing_that_was_filtered_out() -> None:
    logits = torch.arange(10.0).expand(500, 10)
    assert set(sampled(logits, temperature=1e300, top_k=2).tolist()) == {8, 9}


@pytest.mark.parametrize(("function", "name"), [(top_k, "thres"), (gumbel_sample, "temperature")])
def test_nan_is_refused_by_name(function: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected a number, got nan"):
        function(torch.zeros(1, 3), math.nan)
