"""What a forward pass computes in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Precision:
    """Autocast, and a gradient scaler where half precision needs one.

    Its name is `CoreTrainConfig.precision`, of which ``"auto"`` is ``amp_dtype`` on CUDA. On a CPU
    it is float32: without instructions for bfloat16, which few CPUs have, autocast is slower there.
    """

    def __init__(self, name: str, device_type: str, amp_dtype: torch.dtype) -> None:
        given = torch.bfloat16 if name == "bfloat16" else torch.float32
        self.dtype = amp_dtype if name == "auto" and device_type == "cuda" else given
        self._device_type = device_type

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device_type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler of the loss, which does nothing unless the precision is half."""
        return torch.amp.GradScaler(self._device_type, enabled=self.dtype == torch.half)
