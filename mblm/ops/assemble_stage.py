"""``assemble_stage``: a stage's input from its start token, embeddings, positions and context."""

import torch
from torch import Tensor, nn

from mblm.ops._library import Call, compute_dtype, gradients_of, register_operator


def assemble_stage(
    start_token: Tensor,
    embeddings: Tensor,
    ids: Tensor | None = None,
    positions: Tensor | None = None,
    rotation: Tensor | None = None,
    context: Tensor | None = None,
    *,
    padding_idx: int = -1,
) -> Tensor:
    """Lay out ``[start_token, e_1, ..., e_P]`` for every row, with positions and context added.

    Vector ``1 + p`` of a row is ``rotate(e_p) + positions[p] + context[row, p]``; absent terms
    count nothing. The rotation is RoPE's over interleaved pairs of channels:
    ``(x0, x1) -> (x0 * cos - x1 * sin, x1 * cos + x0 * sin)``.

    Args:
        start_token: ``(D,)``, the first vector of each row.
        embeddings: ``(rows, P, D)``; or, with ``ids``, a table ``(V, D)`` they are gathered from.
        ids: ``(rows, P)`` int64 token ids in ``[0, V)``.
        positions: ``(>= P, D)`` position embeddings.
        rotation: ``(>= P, D // 2, 2)``, cosine and sine per position and pair; D is even. It has
            no gradient.
        context: ``(rows, P, D)``, any strides.
        padding_idx: The row of the table that gets no gradient; -1 for none.

    Returns:
        ``(rows, 1 + P, D)``, contiguous, of the dtype of ``embeddings``, to which
        ``start_token``, ``positions`` and ``context`` are cast. Computed in float32 (float64 for
        float64) and rounded once. The gradients are the same from run to run and for any number
        of threads.
    """
    dtype = embeddings.dtype
    out: Tensor = torch.ops.mblm.assemble_stage(
        start_token.to(dtype),
        embeddings,
        ids,
        None if positions is None else positions.to(dtype),
        rotation,
        None if context is None else context.to(dtype),
        padding_idx,
    )
    return out


def assemble_stage_reference(
    start_token: Tensor,
    embeddings: Tensor,
    ids: Tensor | None,
    positions: Tensor | None,
    rotation: Tensor | None,
    context: Tensor | None,
    padding_idx: int,
) -> Tensor:
    """The specification of the native kernel."""
    if ids is not None:
        padding = padding_idx if 0 <= padding_idx < embeddings.shape[0] else None
        embeddings = nn.functional.embedding(ids, embeddings, padding)
    compute = compute_dtype(embeddings.dtype)
    rows, length, _ = embeddings.shape
    vectors = embeddings.to(compute)
    if rotation is not None:
        vectors = _rotate(vectors, rotation[:length].to(compute))
    if positions is not None:
        vectors = vectors + positions[:length].to(compute)
    if context is not None:
        vectors = vectors + context.to(compute)
    start = start_token.expand(rows, 1, -1)
    return torch.cat((start, vectors.to(embeddings.dtype)), dim=1).contiguous()


def assemble_stage_backward_reference(
    grad: Tensor,
    ids: Tensor | None,
    rotation: Tensor | None,
    num_embeddings: int,
    num_positions: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the start token, the embeddings and the positions.

    ``grad`` is ``(rows, 1 + P, D)``. The second result is ``(num_embeddings, D)`` with ``ids``,
    ``(rows, P, D)`` without them but with ``rotation``, and empty with neither: that gradient is
    ``grad[:, 1:]``. The third is ``(num_positions, D)``.
    """
    rows, length, width = grad.shape[0], grad.shape[1] - 1, grad.shape[2]
    shape = (rows, length) if ids is None else (num_embeddings,)
    # Of what is but added, values do not matter.
    sizes = ((), shape, (max(num_positions, length),))
    compute = compute_dtype(grad.dtype)
    zeros = [grad.new_zeros(*size, width, dtype=compute) for size in sizes]

    def assemble(start_token: Tensor, embeddings: Tensor, positions: Tensor) -> Tensor:
        inputs = (start_token, embeddings, ids, positions, rotation, None, padding_idx)
        return assemble_stage_reference(*inputs)

    grads = gradients_of(3, assemble, zeros, grad.to(compute))
    of_start, of_embeddings, of_positions = (of_it.to(grad.dtype) for of_it in grads)
    if ids is None and rotation is None:
        of_embeddings = grad.new_empty(0)
    return of_start, of_embeddings, of_positions[:num_positions]


def _rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation.unbind(-1)
    x0, x1 = vectors.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)


def _backward(call: Call, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, embeddings, ids, positions, rotation, _, padding_idx = call.inputs
    num_positions = 0 if positions is None else positions.shape[0]
    grad_start, grad_embeddings, grad_positions = torch.ops.mblm.assemble_stage_backward(
        grad, ids, rotation, embeddings.shape[0], num_positions, padding_idx
    )
    if ids is None and rotation is None:
        grad_embeddings = grad[:, 1:]
    return grad_start, grad_embeddings, None, grad_positions, None, grad[:, 1:]


register_operator(
    "assemble_stage(Tensor start_token, Tensor embeddings, Tensor? ids, Tensor? positions, "
    "Tensor? rotation, Tensor? context, int padding_idx) -> Tensor",
    assemble_stage_reference,
    "assemble_stage_backward(Tensor grad, Tensor? ids, Tensor? rotation, "
    "SymInt num_embeddings, SymInt num_positions, int padding_idx) "
    "-> (Tensor grad_start, Tensor grad_embeddings, Tensor grad_positions)",
    assemble_stage_backward_reference,
    arguments="embeddings: V D | B P D float, ids: B P int64, start_token: D embeddings, "
    "positions: >=P D embeddings, rotation: >=P D/2 2 float, context: B P D embeddings",
    gradient_arguments="grad: B S D float, grad: B >=1 D float, ids: B S-1 int64, "
    "rotation: >=S-1 D/2 2 float, num_positions: >= 0",
    backward=_backward,
    linear_in=(0, 1, 3, 5),
)
