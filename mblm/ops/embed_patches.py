"""``embed_patches``: pad and nest ids, gather their embeddings and normalize each patch."""

import torch
from torch import Tensor, nn

from mblm.ops._checks import (
    check_device,
    check_floating,
    check_ids_range,
    check_ids_type,
    check_like,
    check_shape,
    compute_dtype,
)
from mblm.ops._library import register_operator


def embed_patches(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_patches: int,
    patch_size: int,
    pad_token_id: int,
    eps: float = 1e-5,
) -> Tensor:
    """Embed patches of R ids as the LayerNorm of their R embeddings, flattened in order.

    The ids are padded on the right with ``pad_token_id`` to ``num_patches * R``. Nothing of the
    size of the result is kept for the backward pass.

    Args:
        ids: ``(B, L)`` int64 token ids in ``[0, V)``, ``L <= num_patches * R``.
        table: ``(V, D)`` embeddings. The pad token's row counts as it is but gets no gradient.
        weight: ``(R * D,)``, LayerNorm's scale.
        bias: ``(R * D,)``, LayerNorm's offset.
        num_patches: Patches per sequence.
        patch_size: R, the ids in a patch, at least 1.
        pad_token_id: In ``[0, V)``.
        eps: Added to the (biased) variance, as in ``torch.nn.LayerNorm``; not negative.

    Returns:
        ``(B, num_patches, R * D)``, contiguous, of the dtype of ``table``. Computed in float32
        (float64 for float64) and rounded once. The gradients are
        the same from run to run and for any number of threads.

    Raises:
        TypeError: ``table``, ``weight`` and ``bias`` are not of one floating-point dtype, or
            ``ids`` is not int64.
        ValueError: A shape, a size or a device does not fit, or an id is not in the table.
    """
    out: Tensor = torch.ops.mblm.embed_patches(
        ids, table, weight, bias, num_patches, patch_size, pad_token_id, eps
    )[0]
    return out


def embed_patches_reference(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_patches: int,
    patch_size: int,
    pad_token_id: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the result and, for backward, mean and ``1 / std``, both ``(B, num_patches)``."""
    _check(ids, table, weight, num_patches, patch_size, pad_token_id)
    check_like("bias", bias, "table", table)
    check_shape("bias", bias, (patch_size * table.shape[1],))
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    check_ids_range(ids, table.shape[0])
    compute = compute_dtype(table.dtype)
    flat = _gather(ids, table, num_patches, patch_size, pad_token_id).to(compute)
    mean = flat.mean(-1)
    centered = flat - mean[..., None]
    inverse_std = (centered.square().mean(-1) + eps).rsqrt()
    normalized = centered * inverse_std[..., None]
    out = normalized * weight.to(compute) + bias.to(compute)
    return out.to(table.dtype), mean, inverse_std


def embed_patches_backward_reference(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    patch_size: int,
    pad_token_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``table``, ``weight`` and ``bias``."""
    _check_backward(grad, ids, table, weight, mean, inverse_std, patch_size, pad_token_id)
    check_ids_range(ids, table.shape[0])
    compute = mean.dtype
    flat = _gather(ids, table, mean.shape[1], patch_size, pad_token_id).to(compute)
    normalized = (flat - mean[..., None]) * inverse_std[..., None]
    grad = grad.to(compute)
    grad_weight = (grad * normalized).sum((0, 1))
    grad_bias = grad.sum((0, 1))

    scaled = grad * weight.to(compute)
    centered = scaled - scaled.mean(-1, keepdim=True)
    along = normalized * (scaled * normalized).mean(-1, keepdim=True)
    grad_flat = (centered - along) * inverse_std[..., None]
    padded_length = mean.shape[1] * patch_size
    grad_vectors = grad_flat.reshape(ids.shape[0], padded_length, table.shape[1])
    grad_table = torch.zeros_like(table, dtype=compute, memory_format=torch.contiguous_format)
    grad_table.index_add_(0, ids.flatten(), grad_vectors[:, : ids.shape[1]].flatten(0, 1))
    grad_table[pad_token_id] = 0
    return (
        grad_table.to(table.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def _gather(
    ids: Tensor, table: Tensor, num_patches: int, patch_size: int, pad_token_id: int
) -> Tensor:
    """The flattened embeddings of each patch, ``(B, num_patches, R * D)``."""
    padded = nn.functional.pad(
        ids, (0, num_patches * patch_size - ids.shape[1]), value=pad_token_id
    )
    vectors = nn.functional.embedding(padded, table, pad_token_id)
    return vectors.reshape(ids.shape[0], num_patches, patch_size * table.shape[1])


def _check(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    num_patches: int,
    patch_size: int,
    pad_token_id: int,
) -> None:
    check_ids_type(ids)
    check_floating("table", table)
    check_device("ids", ids, "table", table)
    if table.dim() != 2 or table.shape[1] < 1:
        raise ValueError(f"table must have shape [V, D] with D >= 1, got {list(table.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if num_patches * patch_size < ids.shape[1]:
        raise ValueError(
            f"num_patches * patch_size must be at least {ids.shape[1]}, the length of ids, "
            f"got {num_patches} * {patch_size}"
        )
    if not 0 <= pad_token_id < table.shape[0]:
        raise ValueError(f"pad_token_id must lie in [0, {table.shape[0]}), got {pad_token_id}")
    check_like("weight", weight, "table", table)
    check_shape("weight", weight, (patch_size * table.shape[1],))


def _check_backward(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    patch_size: int,
    pad_token_id: int,
) -> None:
    if mean.dim() != 2:
        raise ValueError(f"mean must have shape [B, num_patches], got {list(mean.shape)}")
    _check(ids, table, weight, mean.shape[1], patch_size, pad_token_id)
    check_shape("mean", mean, (ids.shape[0], mean.shape[1]))
    check_shape("inverse_std", inverse_std, tuple(mean.shape))
    check_like("grad", grad, "table", table)
    check_shape("grad", grad, (*mean.shape, patch_size * table.shape[1]))
    compute = compute_dtype(table.dtype)
    for name, moments in (("mean", mean), ("inverse_std", inverse_std)):
        if moments.dtype != compute:
            raise TypeError(f"{name} must be {compute}, got {moments.dtype}")


register_operator(
    "embed_patches(Tensor ids, Tensor table, Tensor weight, Tensor bias, SymInt num_patches, "
    "SymInt patch_size, int pad_token_id, float eps) "
    "-> (Tensor out, Tensor mean, Tensor inverse_std)",
    reference=embed_patches_reference,
    derivable=embed_patches_reference,
    backward="embed_patches_backward",
    intermediates=2,
)
register_operator(
    "embed_patches_backward(Tensor grad, Tensor ids, Tensor table, Tensor weight, Tensor mean, "
    "Tensor inverse_std, SymInt patch_size, int pad_token_id) "
    "-> (Tensor grad_table, Tensor grad_weight, Tensor grad_bias)",
    reference=embed_patches_backward_reference,
)
