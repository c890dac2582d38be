"""Transformer stages against a plain re-statement of their formula, and their properties."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from mblm.model.transformer import TransformerDecoder, TransformerEncoder
from mblm.model.transformer_layers import RotaryEmbedding


def naive_norm(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    norm = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / norm.clamp(min=1e-8) * g


def naive_shift(x: torch.Tensor) -> torch.Tensor:
    """The last half of the channels is delayed by one position."""
    kept = x.shape[-1] - x.shape[-1] // 2
    delayed = torch.zeros_like(x[..., kept:])
    delayed[:, 1:] = x[:, :-1, kept:]
    return torch.cat((x[..., :kept], delayed), dim=-1)


def naive_rotary(x: torch.Tensor) -> torch.Tensor:
    """Halves ``[-x2, x1]`` of a head, base 10000; (B, H, S, d)."""
    half = x.shape[-1] // 2
    rates = torch.tensor([10_000 ** (-i / half) for i in range(half)])
    angles = torch.arange(x.shape[-2])[:, None] * rates
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat(
        (x1 * angles.cos() - x2 * angles.sin(), x2 * angles.cos() + x1 * angles.sin()), dim=-1
    )


def naive_stage(
    stage: TransformerDecoder | TransformerEncoder, x: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    causal = isinstance(stage, TransformerDecoder)
    shift = naive_shift if causal else lambda x: x
    seq_len = x.shape[1]
    for attention, ff in stage.layer_pairs():
        y = naive_norm(shift(x), attention.norm.g)
        q, k, v = (
            t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for t in (y @ attention.to_q.weight.T, *(y @ attention.to_kv.weight.T).chunk(2, -1))
        )
        if stage.rotary_emb is not None:
            q, k = naive_rotary(q), naive_rotary(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -1e30)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + y @ attention.to_out.weight.T
        norm, expand, _, _, contract = ff
        y = F.linear(naive_norm(shift(x), norm.g), expand.weight, expand.bias)
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + F.linear(y, contract.weight, contract.bias)
    return naive_norm(x, stage.norm.g)


def build(kind: type[Any], dim: int = 7, **arguments: Any) -> Any:
    stage = kind(
        **{
            "model_dim": dim,
            "num_layers": 2,
            "attn_head_dim": 4,
            "attn_num_heads": 3,
            "ff_mult": 2,
            **arguments,
        }
    )
    for name, parameter in stage.named_parameters():
        if name.endswith(".g"):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return stage.eval()


@pytest.mark.parametrize("kind", [TransformerDecoder, TransformerEncoder])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 7), (1, 1, 8), (3, 2, 1)])
def test_equals_the_formula(kind: type, rotary: bool, shape: tuple[int, int, int]) -> None:
    stage = build(kind, dim=shape[-1], attn_use_rot_embs=rotary)
    x = torch.randn(shape)
    torch.testing.assert_close(stage(x), naive_stage(stage, x, None), atol=2e-5, rtol=1e-4)


def test_the_encoder_attends_to_what_the_mask_says() -> None:
    stage, x = build(TransformerEncoder), torch.randn(3, 6, 7)
    mask = torch.rand(3, 6) < 0.5
    mask[0] = True
    mask[1] = False  # nothing to attend to: the average over all positions
    out = stage(x, mask)
    torch.testing.assert_close(out, naive_stage(stage, x, mask), atol=2e-5, rtol=1e-4)
    changed = torch.where(mask[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(stage(changed, mask)[0], out[0])
    torch.testing.assert_close(stage(changed, mask)[2][mask[2]], out[2][mask[2]])


@pytest.mark.parametrize("kind", [TransformerDecoder, TransformerEncoder])
@pytest.mark.parametrize("dropout", ["attn_dropout", "ff_dropout"])
def test_dropout_is_for_training_only(kind: type, dropout: str) -> None:
    stage, x = build(kind, **{dropout: 0.5}), torch.randn(2, 9, 7)
    assert torch.equal(stage(x), stage(x))
    torch.testing.assert_close(stage(x), naive_stage(stage, x, None), atol=2e-5, rtol=1e-4)
    stage.train()
    assert not torch.allclose(stage(x), stage(x))


def test_use_flash_attn_changes_nothing() -> None:
    x = torch.randn(2, 9, 7)
    outputs = []
    for flag in (False, True):
        torch.manual_seed(3)
        outputs.append(build(TransformerDecoder, use_flash_attn=flag)(x))
    assert torch.equal(*outputs)


def test_rotary_angles_stay_exact_in_half_precision() -> None:
    """Rounded to half precision, the angles of position 1000 would be off by radians."""
    exact = RotaryEmbedding(16)
    half = nn.Sequential(RotaryEmbedding(16)).bfloat16()[0]
    for expected, actual in zip(exact(995, 10), half(995, 10), strict=True):
        assert torch.equal(expected, actual)
    assert half.inv_freq.dtype == torch.float32
    assert list(half.state_dict()) == ["inv_freq"]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_what_is_masked_has_no_gradient(length: int, rotary: bool) -> None:
    """A row that is wholly masked is an average: only its values have a gradient."""
    stage = build(TransformerEncoder, attn_use_rot_embs=rotary).double()
    x = torch.randn(3, length, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, length) < 0.5
    mask[0], mask[1] = True, False
    weights = torch.randn(x.shape, dtype=torch.float64)

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((out * weights).sum(), [x, *stage.parameters()])

    actual, expected = gradients(stage(x, mask)), gradients(naive_stage(stage, x, mask))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_without_anything_to_attend_to_are_finite_under_autocast(dtype: torch.dtype) -> None:
    stage, x = build(TransformerEncoder, dim=8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [False] * 5])
    with torch.autocast("cpu", dtype=dtype):
        out = stage(x, mask).float()
    torch.testing.assert_close(out[0], stage(x, mask)[0], atol=0.05, rtol=0.05)
    assert out.isfinite().all()
    if dtype == torch.bfloat16:  # whose lowest number drowns the scores, as float32's does
        torch.testing.assert_close(out[1], stage(x, mask)[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("count", [1, 2, 9, 70], ids=lambda count: f"{count} positions")
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
def test_a_shared_start_changes_nothing_but_the_cost(count: int, rotary: bool) -> None:
    model = TransformerDecoder(
        model_dim=7, num_layers=2, attn_head_dim=4, attn_num_heads=2, attn_use_rot_embs=rotary
    ).double()
    start = torch.randn(7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, count - 1, 7, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, count, 7, dtype=torch.float64)
    results = []
    for shared in (False, True):
        rows = torch.cat((start.expand(5, 1, 7), x), dim=1)
        out = model(rows, shared_start=shared)
        inputs = (start, x, *model.parameters())
        results.append((out, *torch.autograd.grad(out, inputs, gradient, allow_unused=True)))
    for plain, shared in zip(*results, strict=True):
        torch.testing.assert_close(plain, shared)


def test_a_shared_start_is_not_taken_where_dropout_tells_rows_apart() -> None:
    model = TransformerDecoder(model_dim=8, num_layers=1, attn_head_dim=4, ff_dropout=0.5)
    rows = torch.randn(1, 3, 8).expand(4, 3, 8)
    out = model.train()(rows, shared_start=True)
    assert not torch.equal(out[0, 0], out[1, 0])
    out = model.eval()(rows, shared_start=True)
    torch.testing.assert_close(out[0], out[3])


@pytest.mark.parametrize("name", ["model_dim", "attn_head_dim", "attn_num_heads", "ff_mult"])
def test_sizes_that_are_none_are_refused(name: str) -> None:
    sizes = {"model_dim": 8, "num_layers": 1, "attn_head_dim": 4}
    for size, error in ((0, ValueError), (-2, ValueError), ("8", TypeError)):
        with pytest.raises(error, match=name):
            TransformerDecoder(**{**sizes, name: size})  # type: ignore[arg-type]
