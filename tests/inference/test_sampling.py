"""The sampler of sessions: what it draws, and the ranges of its arguments."""

import math
from typing import Any

import pytest
import torch

from mblm.inference.sampling import Sampler
from mblm.model.sampling import gumbel_sample, sample


class TestSampler:
    def test_default_is_greedy(self) -> None:
        logits = torch.randn(5, 19)
        assert torch.equal(Sampler()(logits), logits.argmax(-1))

    def test_draws_what_a_plan_of_the_same_does(self) -> None:
        logits = torch.randn(7, 50)
        for thres, top_p in ((0.5, None), (1.0, 0.7)):
            torch.manual_seed(2)
            want = Sampler(0.8, thres, top_p)(logits)
            torch.manual_seed(2)
            uniform = torch.zeros(7, 50).uniform_()
            assert torch.equal(sample(logits, uniform, 0.8, 25, top_p or 0.0, 0.0), want)

    def test_top_p_replaces_the_filter(self) -> None:
        logits = torch.tensor([[0.4, 0.35, 0.25]]).log().expand(500, 3)
        assert set(Sampler(filter_thres=1.0, top_p=0.7)(logits).tolist()) == {0, 1}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("top_p", [None, 0.9])
    def test_half_precision_is_sampled_in_float32(
        self, dtype: torch.dtype, top_p: float | None
    ) -> None:
        logits = torch.randn(200, 257).to(dtype)
        assert torch.equal(Sampler()(logits), logits.argmax(-1))
        ids = []
        for same in (logits, logits.float()):
            torch.manual_seed(3)
            ids.append(Sampler(filter_thres=0.0, top_p=top_p, temperature=2.0)(same))
        assert torch.equal(*ids)

    def test_float64_is_sampled_in_float64(self) -> None:
        logits = torch.randn(1, 257, dtype=torch.float64)
        torch.manual_seed(3)
        noise = -torch.log(-torch.log(torch.zeros_like(logits).uniform_()))
        torch.manual_seed(3)
        assert Sampler(filter_thres=0.0)(logits).item() == (logits + noise).argmax().item()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-45, 1e-38, 1e-31])
    @pytest.mark.parametrize("top_p", [None, 1.0])
    def test_a_temperature_that_is_all_but_0_is_greedy(
        self, dtype: torch.dtype, temperature: float, top_p: float | None
    ) -> None:
        logits = torch.linspace(90, 110, 21).to(dtype)[torch.stack([torch.randperm(21)] * 9)]
        states = []
        for sampler in (Sampler(temperature, 0.0, top_p), Sampler()):
            torch.manual_seed(3)
            assert torch.equal(sampler(logits), logits.argmax(-1))
            states.append(torch.get_rng_state())
        assert torch.equal(*states), "as many random numbers are drawn"
        assert torch.equal(gumbel_sample(logits, temperature), logits.argmax(-1))

    def test_the_hottest_takes_nothing_that_was_filtered_out(self) -> None:
        logits = torch.arange(10.0).expand(500, 10)
        assert set(Sampler(1e300, filter_thres=0.7)(logits).tolist()) == {7, 8, 9}

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got"),
            ({"temperature": -5e-324}, ValueError, "temperature"),
            ({"temperature": 10**400}, TypeError, "temperature: expected a number"),
            ({"temperature": math.inf}, ValueError, "temperature"),
            ({"temperature": math.nan}, ValueError, "temperature"),
            ({"temperature": None}, TypeError, "temperature: expected a number, got None"),
            ({"temperature": "1"}, TypeError, "temperature: expected a number, got '1'"),
            ({"temperature": True}, TypeError, "temperature"),
            ({"filter_thres": -0.1}, ValueError, r"filter_thres: expected a number in \[0, 1\]"),
            ({"filter_thres": 1.1}, ValueError, "filter_thres"),
            ({"filter_thres": math.nan}, ValueError, "filter_thres"),
            ({"filter_thres": []}, TypeError, "filter_thres"),
            ({"top_p": 0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0"),
            ({"top_p": 1.01}, ValueError, "top_p"),
            ({"top_p": "all"}, TypeError, "top_p"),
            ({"generator": 5}, TypeError, "generator: expected a torch.Generator, got 5"),
        ],
    )
    def test_refuses_by_name(
        self, arguments: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            Sampler(**arguments)
