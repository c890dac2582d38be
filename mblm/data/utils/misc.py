"""Loss masks, and the renumbering of values."""

from collections.abc import Iterable

import torch


def target_loss_mask(
    tensor_weight_pairs: Iterable[tuple[torch.Tensor, float]],
) -> torch.Tensor:
    """The loss mask of tensors that stand in a row.

    Args:
        tensor_weight_pairs: Each tensor ``(L_i,)`` with the weight of all its entries.

    Returns:
        ``(L_1 + L_2 + …,)``, float32.

    Raises:
        ValueError: No tensors.
    """
    masks = [
        torch.full_like(tensor, weight, dtype=torch.float) for tensor, weight in tensor_weight_pairs
    ]
    if not masks:
        raise ValueError("tensor_weight_pairs: expected at least one pair, got none")
    return torch.cat(masks)


def shift_remap_tensor(
    tensor: torch.Tensor, range_start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Renumber the values of a tensor: the smallest becomes ``range_start``, the next one more.

    Args:
        tensor: Numbers of any shape.
        range_start: The first of the new values.

    Returns:
        The renumbered tensor, of the same shape and dtype; the old values in order, ``(K,)``;
        and for every entry the index of its old value, so that ``values[indices]`` is ``tensor``.

    Raises:
        ValueError: The new values do not fit into the dtype, or it cannot tell them apart.
    """
    values, indices = torch.unique(tensor, return_inverse=True, sorted=True)
    new = torch.arange(range_start, range_start + len(values), device=tensor.device)
    if not torch.equal(new.to(tensor.dtype).double(), new.double()):
        raise ValueError(
            f"range_start: {len(values)} values from {range_start} do not fit into {tensor.dtype}"
        )
    return new.to(tensor.dtype)[indices], values, indices
