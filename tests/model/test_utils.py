"""Rotary positions against their formula, counts of parameters, and the names of sampling."""

import math

import pytest
import torch
from torch import nn

import mblm.model.sampling
from mblm.model.utils import RoPE, count_params, gumbel_sample, top_k


def naive_rope(x: torch.Tensor, positions: torch.Tensor, base: int = 10_000) -> torch.Tensor:
    """Pairs of channels as complex numbers, each turned by its angle; (B, S, H, D), (B, S)."""
    dim = x.shape[-1]
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], dim // 2, 2).contiguous())
    rates = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angles = positions[..., None].double() * rates  # (B, S, D / 2)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class TestRoPE:
    @pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 1, 1, 2), (3, 9, 1, 6), (2, 0, 1, 4)])
    @pytest.mark.parametrize("base", [10_000, 500])
    def test_equals_the_formula(self, shape: tuple[int, ...], base: int) -> None:
        x = torch.randn(shape)
        positions = torch.arange(shape[1]).expand(shape[:2])
        expected = naive_rope(x, positions, base)
        torch.testing.assert_close(RoPE(shape[-1], max_seq_len=16, base=base)(x), expected)

    def test_may_be_of_more_positions_than_expected(self) -> None:
        rope, x = RoPE(4, max_seq_len=3), torch.randn(1, 50, 1, 4)
        torch.testing.assert_close(rope(x), naive_rope(x, torch.arange(50)[None]))
        assert torch.equal(rope.rotation(7, 9), rope.rotation(0, 16)[7:])

    def test_takes_positions(self) -> None:
        x = torch.randn(2, 3, 2, 6)
        positions = torch.tensor([[0, 7, 3], [40, 1, 1]])
        rope = RoPE(6, max_seq_len=4)
        torch.testing.assert_close(rope(x, input_pos=positions), naive_rope(x, positions))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_the_dtype_and_computes_in_float32(self, dtype: torch.dtype) -> None:
        x = torch.randn(1, 6, 1, 4).to(dtype)
        out = RoPE(4, max_seq_len=8)(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, RoPE(4, max_seq_len=8)(x.float()).to(dtype))

    def test_has_gradients(self) -> None:
        x = torch.randn(1, 3, 1, 4, requires_grad=True)
        RoPE(4, max_seq_len=2)(x).square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths

    def test_is_no_part_of_a_checkpoint(self) -> None:
        assert RoPE(4, max_seq_len=2).state_dict() == {}

    def test_refuses_an_odd_width(self) -> None:
        with pytest.raises(ValueError, match=r"dim: .* even width, got 5"):
            RoPE(5, max_seq_len=2)

    def test_refuses_sizes_that_are_none(self) -> None:
        for dim, length in ((-2, 4), (8, -1), (0, 4)):
            with pytest.raises(ValueError, match="must be at least 1"):
                RoPE(dim, length)
        with pytest.raises(TypeError, match="dim: expected an integer"):
            RoPE("8", 4)  # type: ignore[arg-type]

    @pytest.mark.parametrize("move", ["half precision", "from meta"])
    def test_keeps_exact_angles_wherever_it_is_moved(self, move: str) -> None:
        expected = RoPE(4, max_seq_len=5).rotation(0, 900)
        if move == "half precision":
            moved = nn.Sequential(RoPE(4, max_seq_len=5)).bfloat16()
        else:
            with torch.device("meta"):
                moved = nn.Sequential(RoPE(4, max_seq_len=5))
            moved.to_empty(device="cpu")
        assert torch.equal(moved[0].rotation(0, 5), expected[:5])
        assert torch.equal(moved[0].rotation(0, 900), expected)


class TestCountParams:
    def test_counts_modules_lists_and_parameters(self) -> None:
        layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2, bias=False)])
        tokens = nn.ParameterList([nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2, 2))])
        whole = nn.ModuleDict({"layers": layers, "tokens": tokens})
        total, parts = count_params(whole, ("layers", layers), ("tokens", tokens), ("none", []))
        assert total == 8 + 4 + 9
        assert parts == {"layers": 12, "tokens": 9, "none": 0}

    def test_counts_what_is_learned_only(self) -> None:
        linear = nn.Linear(3, 2)
        linear.bias.requires_grad_(False)
        assert count_params(linear) == (6, {})
        assert count_params(nn.Parameter(torch.zeros(3, 3))) == (9, {})

    def test_refuses_what_has_no_parameters(self) -> None:
        with pytest.raises(TypeError, match="expected modules or parameters to count, got 'a'"):
            count_params("a")  # type: ignore[arg-type]


def test_sampling_has_its_names_here() -> None:
    assert top_k is mblm.model.sampling.top_k
    assert gumbel_sample is mblm.model.sampling.gumbel_sample
    assert math.isfinite(gumbel_sample(torch.zeros(1, 3)).float())
