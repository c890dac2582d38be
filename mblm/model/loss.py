"""Cross entropy per byte, averaged over the entries that count."""

import torch
import torch.nn.functional as F  # noqa: N812


def mean_of_nonzero(losses: torch.Tensor) -> torch.Tensor:
    """Mean of the entries that are not zero; 0, with a gradient, if there are none."""
    return losses.sum() / losses.count_nonzero().clamp(min=1)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, ignored_id: int
) -> torch.Tensor:
    """Loss of ``logits (.., V)`` for ``targets (..)``.

    Each entry is 0 where the target is ``ignored_id``, and is multiplied by ``weights (..)`` if
    given; the result is the mean of the entries that are not zero.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignored_id, reduction="none"
    )
    if weights is not None:
        losses = losses * weights.flatten().to(losses.dtype)
    return mean_of_nonzero(losses)
