"""A linear layer that decodes at the speed of memory."""

import torch
from torch import nn

from mblm.ops.linear import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose few rows, without gradients on a CPU, take the native kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return linear(x, self.weight, self.bias)
