"""Decoding state of a Mamba stage: SSM states and the windows of the convolutions."""

from typing import TYPE_CHECKING, Any

import torch

from mblm.inference.advance import prefill_natively
from mblm.inference.stage_cache import StageCache, State
from mblm.model.native_stages import native_mamba
from mblm.model.plain import is_bare

if TYPE_CHECKING:
    from mblm.model.mamba_layers import MambaStage


class MambaCache(StageCache):
    """SSM states ``(layers, B, ..)`` and windows ``(layers, B, K - 1, D_conv)`` of all layers."""

    def __init__(self, stage: "MambaStage") -> None:
        self.stage = stage
        self._state: list[torch.Tensor] | None = None

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        if self.prefills_natively(x):
            if self._state is None:
                self.advance(x[:, :0])  # the state before all positions
            return prefill_natively([self], x)
        if is_bare(self.stage):  # and compiled for training, maybe
            return self.advance(x)
        y: torch.Tensor = self.stage(x, cache=self)
        return y

    def advance(self, x: torch.Tensor) -> torch.Tensor:
        """`prefill` by the stage's layers."""
        layers = None if self._state is None else tuple(zip(*self._state, strict=True))
        y, layers = self.stage.forward_with_state(x, layers)
        if self._state is None:
            self._state = [torch.stack(parts) for parts in zip(*layers, strict=True)]
        else:
            for own, parts in zip(self._state, zip(*layers, strict=True), strict=True):
                torch._foreach_copy_(list(own.unbind()), list(parts))
        return y

    def empty(self, batch_size: int) -> "MambaCache":
        return MambaCache(self.stage)

    def build_native(self, weights: str) -> Any:
        return native_mamba(self.stage, weights)

    def native_state(self, count: int) -> list[torch.Tensor]:
        assert self._state is not None, "the start token comes first"
        # Under autocast windows were stored in half precision.
        self._state = [part.float() for part in self._state]
        return self._state

    def native_start(self, state: State) -> list[torch.Tensor]:
        return [part.float().contiguous() for part in state]

    def rows_of_state(self, state: State, rows: slice) -> State:
        return None if state is None else [part[:, rows] for part in state]

    def snapshot(self) -> State:
        return None if self._state is None else [part.clone() for part in self._state]

    def restore(self, state: State) -> None:
        if state is None or self._state is None:
            self._state = None if state is None else [part.clone() for part in state]
            return
        for own, saved in zip(self._state, state, strict=True):
            own.copy_(saved)
