"""``embed_patches``: pad and nest ids, gather their embeddings and normalize each patch."""

import torch
from torch import Tensor, nn

from mblm.ops._library import compute_dtype, register_operator


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
    compute = compute_dtype(table.dtype)
    flat = _gather(ids, table, num_patches, patch_size, pad_token_id).to(compute)
    of_norm = flat.shape[-1:], weight.to(compute), bias.to(compute)
    out, mean, inverse_std = torch.native_layer_norm(flat, *of_norm, eps)
    return out.to(table.dtype), mean.squeeze(-1), inverse_std.squeeze(-1)


def embed_patches_backward_reference(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    patch_size: int,
    pad_token_id: int,
) -> tuple[Tensor, ...]:
    """Returns the gradients of ``table``, ``weight`` and ``bias``."""
    compute, weight = mean.dtype, weight.to(mean.dtype)
    flat = _gather(ids, table, mean.shape[1], patch_size, pad_token_id).to(compute)
    grad_flat, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        *(grad.to(compute).contiguous(), flat, flat.shape[-1:]),
        *(mean[..., None], inverse_std[..., None], weight, weight, [True] * 3),
    )
    of_vectors = grad_flat.unflatten(-1, (patch_size, table.shape[1])).flatten(1, 2)
    grad_table = torch.zeros_like(table, dtype=compute, memory_format=torch.contiguous_format)
    grad_table.index_add_(0, ids.flatten(), of_vectors[:, : ids.shape[1]].flatten(0, 1))
    grad_table[pad_token_id] = 0
    return tuple(g.to(table.dtype) for g in (grad_table, grad_weight, grad_bias))


def _gather(
    ids: Tensor, table: Tensor, num_patches: int, patch_size: int, pad_token_id: int
) -> Tensor:
    """The flattened embeddings of each patch, ``(B, num_patches, R * D)``."""
    missing = num_patches * patch_size - ids.shape[1]
    if missing < 0:  # which would cut ids off
        raise ValueError(
            f"num_patches * patch_size must be at least {ids.shape[1]}, the length of ids, "
            f"got {num_patches} * {patch_size}"
        )
    padded = nn.functional.pad(ids, (0, missing), value=pad_token_id)
    vectors = nn.functional.embedding(padded, table, pad_token_id)
    return vectors.reshape(ids.shape[0], num_patches, patch_size * table.shape[1])


_ARGUMENTS = "patch_size: >= 1, ids: B L int64, table: V D float, weight: patch_size*D table"
register_operator(
    "embed_patches(Tensor ids, Tensor table, Tensor weight, Tensor bias, SymInt num_patches, "
    "SymInt patch_size, int pad_token_id, float eps) "
    "-> (Tensor out, Tensor mean, Tensor inverse_std)",
    embed_patches_reference,
    "embed_patches_backward(Tensor grad, Tensor ids, Tensor table, Tensor weight, Tensor mean, "
    "Tensor inverse_std, SymInt patch_size, int pad_token_id) "
    "-> (Tensor grad_table, Tensor grad_weight, Tensor grad_bias)",
    embed_patches_backward_reference,
    arguments=f"{_ARGUMENTS}, bias: patch_size*D table, eps: >= 0",
    gradient_arguments=f"{_ARGUMENTS}, mean: B n computed, inverse_std: B n mean, "
    "grad: B n patch_size*D table",
    intermediates=2,
)
