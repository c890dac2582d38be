"""The Mamba-1 stage model: mambapy's parameters, this package's computation and state."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from mambapy.mamba import Mamba, MambaConfig
from torch import Tensor, nn

from mblm.inference.stage_cache import StageCache
from mblm.model.mamba_cache import MambaCache
from mblm.model.mamba_scans import mamba1_scan
from mblm.ops.causal_conv import causal_conv
from mblm.ops.linear import linear
from mblm.ops.selective_scan import selective_scan_step

LayerState = tuple[Tensor, Tensor]  # SSM state (B, D_inner, N), conv window (B, K - 1, D_inner)
State = tuple[LayerState, ...]


class Mamba1(nn.Module):
    """Pre-norm residual Mamba-1 layers (Gu and Dao 2023, https://arxiv.org/abs/2312.00752).

    Parameters, their names and their initialization are those of mambapy's ``Mamba``. The SSM
    state is float32 (float64 in a float64 model) whatever the activations are.

    Args:
        model_dim: Width D of the stage.
        num_layers: Number of layers.
        d_state: States N per channel.
        d_conv: Taps K of the causal convolution.
        expand: Inner width D_inner as a multiple of D.

    Raises:
        ValueError: A size is below 1.
    """

    has_state_of_pairs = True  # which lets the hierarchy run it in segments of positions

    def __init__(
        self, *, model_dim: int, num_layers: int, d_state: int, d_conv: int, expand: int
    ) -> None:
        super().__init__()
        sizes = {
            "model_dim": model_dim,
            "num_layers": num_layers,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        config = MambaConfig(
            d_model=model_dim,
            n_layers=num_layers,
            d_state=d_state,
            d_conv=d_conv,
            expand_factor=expand,
        )
        self.model_dim = model_dim
        self.layers = Mamba(config).layers

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D) causally, from the zero state."""
        return self._run(x, None, y_only=True)[0]

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
        return self._run(x, state, y_only=False)

    def _run(self, x: Tensor, state: State | None, *, y_only: bool) -> tuple[Tensor, State]:
        if x.ndim != 3 or x.shape[-1] != self.model_dim:
            raise ValueError(f"x must be (B, S, {self.model_dim}), got shape {tuple(x.shape)}")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state must have {len(self.layers)} layers, got {len(state)}")
        states: list[LayerState] = []
        layer: Any  # mambapy's ResidualBlock
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(
                x.to(layer.norm.weight.dtype), (self.model_dim,), layer.norm.weight, layer.norm.eps
            )
            out, layer_state = _mix(
                layer.mixer, normed, None if state is None else state[index], y_only=y_only
            )
            x = out + x
            states.append(layer_state)
        return x, tuple(states)


def _project(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _mix(
    mixer: Any, x: Tensor, state: LayerState | None, *, y_only: bool
) -> tuple[Tensor, LayerState]:
    """One mixer on (B, S, D): the convolved and scanned branch, gated by the other."""
    scan_state, window = (None, None) if state is None else state
    inner, gate = _project(mixer.in_proj, x).chunk(2, dim=-1)  # (B, S, D_inner) each
    window = None if window is None else window.to(inner.dtype)  # autocast may have begun since
    inner, window = causal_conv(inner, mixer.conv1d.weight, mixer.conv1d.bias, window)

    dtype = torch.promote_types(mixer.A_log.dtype, torch.float32)
    rates = -torch.exp(mixer.A_log.to(dtype))  # (D_inner, N)
    direct = mixer.D.to(dtype)
    rank, num_states = mixer.dt_proj.in_features, rates.shape[1]
    delta, weight_in, weight_out = _project(mixer.x_proj, inner).split(
        [rank, num_states, num_states], dim=-1
    )
    inner = inner.to(weight_in.dtype)
    delta = F.softplus(_project(mixer.dt_proj, delta).to(dtype))  # (B, S, D_inner)

    if scan_state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
        y, scan_state = selective_scan_step(
            inner[:, 0], delta[:, 0], rates, weight_in[:, 0], weight_out[:, 0], direct, scan_state
        )
        y = y.unsqueeze(1)
    else:
        y, scan_state = mamba1_scan(
            inner, delta, rates, weight_in, weight_out, direct, scan_state, y_only=y_only
        )
    return _project(mixer.out_proj, y * F.silu(gate)), (scan_state, window)
