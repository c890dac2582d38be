"""The Mamba stage block; its models are built by `mamba1` and `mamba2`."""

import warnings
from importlib.util import find_spec
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from mblm.model.block import StageBlock


def default_mamba_type() -> Literal["mamba1", "mamba2"]:
    """``"mamba2"`` where the package ``mamba_ssm`` is installed, else ``"mamba1"``."""
    return "mamba1" if find_spec("mamba_ssm") is None else "mamba2"


class MambaBlock(StageBlock):
    """A Mamba stage; needs about ``3 * expand * model_dim**2`` parameters per layer.

    Attributes:
        d_state: Size of the SSM state per channel (Mamba-1) or head (Mamba-2).
        d_conv: Width of the causal convolution.
        expand: Inner width over model width.
        headdim: Channels of a head; Mamba-2 only.
        dropout: Dropout before the final norm, in training; Mamba-2 only.
        block_type: ``"mamba1"`` or ``"mamba2"``; either is built on any device. The default is
            ``"mamba2"`` where ``mamba_ssm`` is installed, else ``"mamba1"``, with a warning.
    """

    d_state: PositiveInt
    d_conv: PositiveInt
    expand: PositiveInt
    headdim: PositiveInt
    dropout: NonNegativeFloat = Field(default=0.0, le=1.0)
    block_type: Literal["mamba1", "mamba2"] = Field(default_factory=default_mamba_type)

    def to_model(self, model_dim: int, num_layers: int) -> torch.nn.Module:
        """Build a `Mamba1` or a `Mamba2`, as ``block_type`` says."""
        sizes = {
            "model_dim": model_dim,
            "num_layers": num_layers,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
            "expand": self.expand,
        }
        if self.block_type == "mamba1":
            if "block_type" not in self.model_fields_set:
                warnings.warn(
                    "a Mamba block without block_type becomes a Mamba-1, because mamba_ssm is not "
                    "installed; the published experiments are of Mamba-2. This line in the block "
                    "decides it: `block_type: mamba2`, or `block_type: mamba1`",
                    stacklevel=2,
                )
            from mblm.model.mamba1 import Mamba1

            return Mamba1(**sizes)
        from mblm.model.mamba2 import Mamba2

        return Mamba2(**sizes, headdim=self.headdim, dropout=self.dropout)
