"""The Mamba-2 stage model: mamba_ssm's parameters on any device, with a state."""

import math
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.inference.stage_cache import StageCache
from mblm.model.linear import Linear
from mblm.model.mamba_cache import MambaCache
from mblm.model.mamba_scans import mamba2_scan
from mblm.ops.causal_conv import causal_conv
from mblm.ops.gated_rms_norm import gated_rms_norm
from mblm.ops.ssd import ssd_step

LayerState = tuple[Tensor, Tensor]  # SSM state (B, H, P, N), conv window (B, K - 1, D_conv)
State = tuple[LayerState, ...]

_NORM_EPS = 1e-5


class Mamba2(nn.Module):
    """Pre-norm residual Mamba-2 layers and a final norm.

    Dao and Gu 2024, https://arxiv.org/abs/2405.21060. Parameters, their names and their
    initialization are those of mamba_ssm's ``create_block`` with ``Mamba2`` and of its
    ``MixerModel``. The SSM state is float32 (float64 in a float64 model) whatever the activations
    are.

    Args:
        model_dim: Width D of the stage.
        num_layers: Number of layers.
        d_state: States N per channel.
        d_conv: Taps K of the causal convolution.
        expand: Inner width D_inner as a multiple of D.
        headdim: Channels P per head; H = D_inner / P.
        dropout: Probability of zeroing an output of the last mixer, in training.

    Raises:
        ValueError: A size is below 1, ``headdim`` does not divide the inner width, or ``dropout``
            is not a probability.
    """

    has_state_of_pairs = True  # which lets the hierarchy run it in segments of positions

    def __init__(
        self,
        *,
        model_dim: int,
        num_layers: int,
        d_state: int,
        d_conv: int,
        expand: int,
        headdim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "model_dim": model_dim,
            "num_layers": num_layers,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "headdim": headdim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if (expand * model_dim) % headdim:
            raise ValueError(
                f"headdim must divide the inner width expand · model_dim = {expand * model_dim}, "
                f"got {headdim}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.model_dim = model_dim
        self.dropout = dropout
        self.layers = nn.ModuleList(
            _Layer(model_dim, d_state, d_conv, expand * model_dim, headdim)
            for _ in range(num_layers)
        )
        self.norm_f = nn.RMSNorm(model_dim, eps=_NORM_EPS)
        for layer in self.layers:
            # GPT-2's scaling of what enters the residual path, by the number of layers.
            weight = cast(_Layer, layer).mixer.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight /= math.sqrt(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D) causally, from the zero state."""
        return self.forward_with_state(x, None)[0]

    def allocate_cache(self, batch_size: int, max_positions: int | None) -> StageCache:
        """Decoding state: SSM states and the windows of the convolutions; see `StageCache`."""
        return MambaCache(self)

    def forward_with_state(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Continue after the positions that ``state`` has seen.

        Args:
            x: (B, S, D).
            state: What an earlier call returned, left as it is; None at the beginning.

        Returns:
            (B, S, D) and the state after the last position.

        Raises:
            ValueError: ``x`` or ``state`` does not fit this model.
        """
        if x.ndim != 3 or x.shape[-1] != self.model_dim:
            raise ValueError(f"x must be (B, S, {self.model_dim}), got shape {tuple(x.shape)}")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state must have {len(self.layers)} layers, got {len(state)}")
        states: list[LayerState] = []
        last = len(self.layers) - 1
        for index, module in enumerate(self.layers):
            layer = cast(_Layer, module)
            out, layer_state = layer.mixer(
                gated_rms_norm(x, layer.norm.weight, eps=_NORM_EPS),
                None if state is None else state[index],
            )
            if index == last:
                out = F.dropout(out, self.dropout, self.training)
            x = out + x
            states.append(layer_state)
        out = gated_rms_norm(x, self.norm_f.weight, eps=_NORM_EPS)
        return out.to(x.dtype), tuple(states)


class _Layer(nn.Module):
    def __init__(
        self, model_dim: int, d_state: int, d_conv: int, inner_dim: int, headdim: int
    ) -> None:
        super().__init__()
        self.mixer = _Mixer(model_dim, d_state, d_conv, inner_dim, headdim)
        self.norm = nn.RMSNorm(model_dim, eps=_NORM_EPS)


class _Mixer(nn.Module):
    """Parameters are made in mamba_ssm's order, so that a seed means the same numbers."""

    def __init__(
        self, model_dim: int, d_state: int, d_conv: int, inner_dim: int, headdim: int
    ) -> None:
        super().__init__()
        self.inner_dim, self.d_state, self.headdim = inner_dim, d_state, headdim
        self.num_heads = inner_dim // headdim
        conv_dim = inner_dim + 2 * d_state  # x, B and C
        self.in_proj = Linear(model_dim, inner_dim + conv_dim + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        # Step sizes log-uniform in [0.001, 0.1], through the inverse of softplus.
        spread = math.log(0.1) - math.log(0.001)
        dt = torch.exp(torch.rand(self.num_heads) * spread + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.num_heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(inner_dim, eps=_NORM_EPS)
        self.out_proj = Linear(inner_dim, model_dim, bias=False)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """(B, S, D) and a state to (B, S, D) and the next state."""
        length = x.shape[1]
        scan_state, window = (None, None) if state is None else state
        gate, mixed, dt = self.in_proj(x).split(
            [self.inner_dim, self.conv1d.out_channels, self.num_heads], dim=-1
        )
        window = None if window is None else window.to(mixed.dtype)  # autocast may have begun since
        mixed, window = causal_conv(
            mixed, self.conv1d.weight, cast(Tensor, self.conv1d.bias), window
        )
        inner, weight_in, weight_out = mixed.split(
            [self.inner_dim, self.d_state, self.d_state], dim=-1
        )
        inner = inner.unflatten(-1, (self.num_heads, self.headdim))  # (B, S, H, P)

        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        rates = -torch.exp(self.A_log.to(dtype))  # (H,)
        direct = self.D.to(dtype)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))  # (B, S, H)

        if scan_state is not None and length == 1 and not torch.is_grad_enabled():
            y, scan_state = ssd_step(
                inner[:, 0], dt[:, 0], rates, weight_in[:, 0], weight_out[:, 0], direct, scan_state
            )
        else:
            y, scan_state = mamba2_scan(inner, dt, rates, weight_in, weight_out, direct, scan_state)
        normed = gated_rms_norm(y.reshape(gate.shape), self.norm.weight, gate, eps=_NORM_EPS)
        return self.out_proj(normed), (scan_state, window)
