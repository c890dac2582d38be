"""Cross entropy per byte, averaged over the entries that count."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def losses_per_byte(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignored_id: int
) -> Tensor:
    """Losses, flattened, of ``logits (.., V)`` for ``targets (..)``.

    Each is 0 where the target is ``ignored_id``, and is multiplied by ``weights (..)`` if given.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignored_id, reduction="none"
    )
    return losses if weights is None else losses * weights.flatten().to(losses.dtype)


def sum_and_count(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, at least in float32, and the number of the entries that are not zero."""
    dtype = torch.promote_types(losses.dtype, torch.float32)
    return losses.sum(dtype=dtype), losses.count_nonzero()


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, ignored_id: int
) -> Tensor:
    """The mean of those `losses_per_byte` that are not zero; 0, with a gradient, without any."""
    losses = losses_per_byte(logits, targets, weights, ignored_id)
    total, count = sum_and_count(losses)
    return (total / count.clamp(min=1)).to(losses.dtype)
