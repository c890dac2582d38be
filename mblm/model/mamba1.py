"""The Mamba-1 stage model: mambapy's parameters, this package's computation and state."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from mambapy.mamba import MambaBlock, MambaConfig
from torch import Tensor, nn

from mblm.model.linear import apply
from mblm.model.mamba_layers import Carried, MambaLayer, MambaStage, convolve
from mblm.model.mamba_scans import mamba1_scan
from mblm.model.plain import Part
from mblm.ops import _native
from mblm.ops.packing import pack_linear
from mblm.utils.huge_pages import HugePages


class Mamba1Mixer(MambaBlock):
    """The convolved and scanned branch, gated by the other."""

    def forward(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), after a state where one is carried."""
        before = None if carried is None else carried.before
        scan_state, window = (None, None) if before is None else before
        inner, gate = apply(self.in_proj, x).chunk(2, dim=-1)  # (B, S, D_inner) each
        inner, window = convolve(self.conv1d, self.config.d_conv, inner, window)

        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        rates = -torch.exp(self.A_log.to(dtype))  # (D_inner, N)
        direct = self.D.to(dtype)
        rank, num_states = self.config.dt_rank, rates.shape[1]
        delta, weight_in, weight_out = apply(self.x_proj, inner).split(
            [rank, num_states, num_states], dim=-1
        )
        inner = inner.to(weight_in.dtype)
        delta = F.softplus(apply(self.dt_proj, delta).to(dtype))  # (B, S, D_inner)

        inputs = (inner, delta, rates, weight_in, weight_out, direct)
        y, scan_state = mamba1_scan(inputs, scan_state, y_only=carried is None)
        if carried is not None:
            carried.after = scan_state, window
        return apply(self.out_proj, y * F.silu(gate))


class Mamba1(MambaStage):
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

    mixer_class = Mamba1Mixer
    linears = ("in_proj", "x_proj", "dt_proj", "out_proj")

    def __init__(
        self, *, model_dim: int, num_layers: int, d_state: int, d_conv: int, expand: int
    ) -> None:
        super().__init__(
            model_dim, num_layers=num_layers, d_state=d_state, d_conv=d_conv, expand=expand
        )
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand_factor": expand}
        config = MambaConfig(model_dim, num_layers, **sizes)
        self.layers = nn.ModuleList(
            MambaLayer(Mamba1Mixer(config), model_dim) for _ in range(num_layers)
        )

    def parts(self) -> Iterator[Part]:
        """The modules that it computes with, as built; see `mblm.model.plain.are_plain`."""
        yield self, Mamba1
        yield from self.parts_of_layers()

    def pack(self, weights: str, memory: HugePages) -> Any:
        """Its weights as compiled decoding reads them; see `mblm.model.stage.Stage`."""
        tensors: list[Tensor] = []
        eps: list[float] = []
        layer: Any
        for layer in self.layers:
            mixer = layer.mixer
            eps.append(layer.norm.eps)
            tensors += [layer.norm.weight, -torch.exp(mixer.A_log)]
            tensors += [mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.D]
            for name in self.linears:
                tensors += pack_linear(getattr(mixer, name), weights, memory)
        return _native.library().Stage.mamba1(tensors, eps)
