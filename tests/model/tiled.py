"""Models that compute in tiles, and what compares them with those that do not."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mblm import MBLM, MBLMEncoder, MBLMReturnType

LOSS, LOGITS = MBLMReturnType.LOSS, MBLMReturnType.LOGITS
LOSS_LOGITS, HIDDEN = MBLMReturnType.LOSS_LOGITS, MBLMReturnType.HIDDEN_STATE
CLOSE = {"atol": 1e-9, "rtol": 1e-7}  # in float64, where cancellation is of constants' rounding
PAD = 18  # of the models below, whose vocabulary is 19
Model = MBLM | MBLMEncoder


def tiled(m: Model, tile: int | None = 4, **fields: Any) -> Any:
    """A copy of a model that computes in tiles."""
    m = copy.deepcopy(m)
    m.config = m.config.model_copy(update={"tile": tile, **fields})
    return m


def draw_ids(*shape: int) -> Tensor:
    return torch.randint(0, PAD, shape)


def gradients(m: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in m.named_parameters()}


def assert_same_gradients(
    m: nn.Module, other: nn.Module, losses: list[Tensor], **close: float
) -> None:
    expected, actual = gradients(m, losses[0]), gradients(other, losses[1])
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        torch.testing.assert_close(
            actual[name], gradient, **(close or CLOSE), msg=lambda text, n=name: f"{n}: {text}"
        )
