"""The Mamba-2 stage model: mamba_ssm's parameters on any device, with a state."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mblm.model.linear import apply
from mblm.model.mamba_layers import NORM_EPS, Carried, MambaLayer, MambaStage, convolve, rms_norm
from mblm.model.mamba_scans import mamba2_scan
from mblm.model.plain import Part
from mblm.ops import _native
from mblm.ops.packing import pack_linear
from mblm.utils.huge_pages import HugePages


class Mamba2Mixer(nn.Module):
    """Parameters are made in mamba_ssm's order, so that a seed means the same numbers."""

    def __init__(
        self, model_dim: int, d_state: int, d_conv: int, inner_dim: int, headdim: int
    ) -> None:
        super().__init__()
        self.inner_dim, self.d_state, self.headdim = inner_dim, d_state, headdim
        self.d_conv = d_conv
        self.num_heads = inner_dim // headdim
        conv_dim = inner_dim + 2 * d_state  # x, B and C
        self.in_proj = nn.Linear(model_dim, inner_dim + conv_dim + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        # Step sizes log-uniform in [0.001, 0.1], through the inverse of softplus.
        spread = math.log(0.1) - math.log(0.001)
        dt = torch.exp(torch.rand(self.num_heads) * spread + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.num_heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(inner_dim, eps=NORM_EPS)
        self.out_proj = nn.Linear(inner_dim, model_dim, bias=False)

    def forward(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), after a state where one is carried."""
        before = None if carried is None else carried.before
        scan_state, window = (None, None) if before is None else before
        gate, mixed, dt = apply(self.in_proj, x).split(
            [self.inner_dim, self.inner_dim + 2 * self.d_state, self.num_heads], dim=-1
        )
        mixed, window = convolve(self.conv1d, self.d_conv, mixed, window)
        inner, weight_in, weight_out = mixed.split(
            [self.inner_dim, self.d_state, self.d_state], dim=-1
        )
        inner = inner.unflatten(-1, (self.num_heads, self.headdim))  # (B, S, H, P)

        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        rates = -torch.exp(self.A_log.to(dtype))  # (H,)
        direct = self.D.to(dtype)
        dt = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))  # (B, S, H)

        inputs = inner, dt, rates, weight_in, weight_out, direct
        y, scan_state = mamba2_scan(inputs, scan_state)
        if carried is not None:
            carried.after = scan_state, window
        return apply(self.out_proj, rms_norm(self.norm, y.reshape(gate.shape), gate))


class Mamba2(MambaStage):
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

    mixer_class = Mamba2Mixer
    linears = ("in_proj", "out_proj")

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
        sizes = {"num_layers": num_layers, "d_state": d_state, "d_conv": d_conv}
        super().__init__(model_dim, **sizes, expand=expand, headdim=headdim)
        if (expand * model_dim) % headdim:
            raise ValueError(
                f"headdim must divide the inner width expand · model_dim = {expand * model_dim}, "
                f"got {headdim}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        dropouts = [0.0] * (num_layers - 1) + [dropout]
        self.layers = nn.ModuleList(
            MambaLayer(
                Mamba2Mixer(model_dim, d_state, d_conv, expand * model_dim, headdim),
                model_dim,
                dropout,
            )
            for dropout in dropouts
        )
        self.norm_f = nn.RMSNorm(model_dim, eps=NORM_EPS)
        for layer in self.layers:
            # GPT-2's scaling of what enters the residual path, by the number of layers.
            weight = cast(Any, layer).mixer.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            with torch.no_grad():
                weight /= math.sqrt(num_layers)

    def finish(self, x: Tensor) -> Tensor:
        """The final norm."""
        return rms_norm(self.norm_f, x).to(x.dtype)

    def parts(self) -> Iterator[Part]:
        """The modules that it computes with, as built; see `mblm.model.plain.are_plain`."""
        yield self, Mamba2
        yield self.norm_f, nn.RMSNorm
        yield from self.parts_of_layers()
        yield from ((layer.mixer.norm, nn.RMSNorm) for layer in self.layers)  # type: ignore[misc]

    def pack(self, weights: str, memory: HugePages) -> Any:
        """Its weights as compiled decoding reads them, or None; see `mblm.model.stage.Stage`."""
        norms = [module for module, kind in self.parts() if kind is nn.RMSNorm]
        if any(norm.eps != self.norm_f.eps for norm in norms):
            return None
        tensors: list[Tensor] = [self.norm_f.weight]
        layer: Any
        for layer in self.layers:
            mixer = layer.mixer
            tensors += [layer.norm.weight, mixer.norm.weight, -torch.exp(mixer.A_log)]
            tensors += [mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.dt_bias, mixer.D]
            for name in self.linears:
                tensors += pack_linear(getattr(mixer, name), weights, memory)
        return _native.library().Stage.mamba2(tensors, self.norm_f.eps)
