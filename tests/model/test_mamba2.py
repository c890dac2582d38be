"""Mamba-2 against a plain float64 computation from its parameters, and its initialization."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.model.mamba2 import Mamba2

SIZES = {
    "model_dim": 32,
    "num_layers": 2,
    "d_state": 8,
    "d_conv": 4,
    "expand": 2,
    "headdim": 16,
}
INNER, HEADS, STATES = 64, 4, 8


def make_model(**changes: float) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(**(SIZES | changes))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def plain_mixer(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One Mamba-2 mixer on (B, S, D), position by position."""
    z, xbc, dt = (x @ w["in_proj.weight"].T).split([INNER, INNER + 2 * STATES, HEADS], dim=-1)
    taps = w["conv1d.weight"].shape[-1]
    padded = F.pad(xbc, (0, 0, taps - 1, 0))
    state = x.new_zeros(x.shape[0], HEADS, INNER // HEADS, STATES)
    outputs = []
    for t in range(x.shape[1]):
        window = padded[:, t : t + taps]  # (B, K, D_conv)
        mixed = torch.einsum("bkd,dk->bd", window, w["conv1d.weight"][:, 0])
        mixed = F.silu(mixed + w["conv1d.bias"])
        inner, b, c = mixed.split([INNER, STATES, STATES], dim=-1)
        inner = inner.reshape(-1, HEADS, INNER // HEADS)
        step = F.softplus(dt[:, t] + w["dt_bias"])  # (B, H)
        decay = torch.exp(-step * w["A_log"].exp())
        arriving = torch.einsum("bh,bhp,bn->bhpn", step, inner, b)
        state = decay[..., None, None] * state + arriving
        y = torch.einsum("bhpn,bn->bhp", state, c) + w["D"][:, None] * inner
        outputs.append(y.reshape(-1, INNER))
    y = torch.stack(outputs, dim=1)
    return rms_norm(y * F.silu(z), w["norm.weight"]) @ w["out_proj.weight"].T


def plain_forward(model: Mamba2, x: Tensor) -> Tensor:
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = x.double()
    for layer in range(len(model.layers)):
        prefix = f"layers.{layer}.mixer."
        mixer = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        x = x + plain_mixer(rms_norm(x, weights[f"layers.{layer}.norm.weight"]), mixer)
    return rms_norm(x, weights["norm_f.weight"])


@pytest.mark.parametrize("length", [1, 2, 65])
def test_forward_equals_the_plain_computation(length: int) -> None:
    model = make_model()
    for parameter in model.parameters():  # no weight stays at one or zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(3, length, 32)
    expected = plain_forward(model, x)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=2e-5)


def test_state_dict_keys() -> None:
    mixer = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias"]
    mixer += ["in_proj.weight", "norm.weight", "out_proj.weight"]
    layer = [f"mixer.{name}" for name in mixer] + ["norm.weight"]
    expected = [f"layers.{i}.{name}" for i in (0, 1) for name in layer] + ["norm_f.weight"]
    assert sorted(make_model().state_dict()) == sorted(expected)


def test_initialization_draws_in_the_order_of_mamba_ssm() -> None:
    model = make_model()
    torch.manual_seed(0)
    expected = {}
    for i in (0, 1):
        mixer = f"layers.{i}.mixer"
        expected[f"{mixer}.in_proj.weight"] = nn.Linear(32, 148, bias=False).weight
        conv = nn.Conv1d(80, 80, 4, groups=80)
        expected |= {f"{mixer}.conv1d.weight": conv.weight, f"{mixer}.conv1d.bias": conv.bias}
        low, high = math.log(0.001), math.log(0.1)
        dt = torch.exp(torch.rand(4) * (high - low) + low)
        expected[f"{mixer}.dt_bias"] = dt + torch.log(-torch.expm1(-dt))
        expected[f"{mixer}.A_log"] = torch.empty(4).uniform_(1, 16).log()
        nn.Linear(64, 32, bias=False)  # drawn, then drawn again below
    for i in (0, 1):
        out_proj = nn.init.kaiming_uniform_(torch.empty(32, 64), a=math.sqrt(5))
        expected[f"layers.{i}.mixer.out_proj.weight"] = out_proj / math.sqrt(2)
    actual = model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual.pop(name), tensor.data, rtol=0, atol=0)
    assert all((tensor == 1).all() for tensor in actual.values())  # D and the norms


def test_dropout_is_for_training_alone() -> None:
    model = make_model(dropout=0.5)
    x = torch.randn(2, 5, 32)
    torch.manual_seed(1)
    assert not torch.allclose(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), make_model()(x), rtol=0, atol=0)


def test_dropout_spares_the_residual_path() -> None:
    model = make_model(num_layers=1, dropout=1.0)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(model(x), rms_norm(x, torch.ones(32)))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_model(**{name: 0})


def test_other_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"headdim must divide .* 64, got 48"):
        make_model(headdim=48)
    with pytest.raises(ValueError, match=r"dropout must be between 0 and 1, got 1\.5"):
        make_model(dropout=1.5)
