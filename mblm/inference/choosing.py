"""The next bytes of rows, each as its plan says."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mblm.inference.progress import Progress
from mblm.model.sampling import sample, sampling_dtype


def sampled_bytes(
    progress: Sequence[Progress],
    rooms: Sequence[int | None],
    own: Tensor,
    instead: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Progress]:
    """Plans with a byte each that is sampled from the model's ``own`` logits ``(rows, V)``.

    ``rooms`` tells how many bytes more each may have, None for any number; ``instead`` are other
    logits to sample from; ``mask (rows, V)`` allows bytes.
    """
    logits = own if instead is None else instead.to(own)
    logits = logits.to(sampling_dtype(logits.dtype))
    allowed = [now.allowed(room) for now, room in zip(progress, rooms, strict=True)]
    may_come = None
    if any(row is not None for row in allowed):
        everything = torch.ones(logits.shape[1], dtype=torch.bool, device="cpu")
        may_come = torch.stack([everything if row is None else row for row in allowed])
        may_come = may_come.to(own.device)
        logits = logits.masked_fill(~may_come, float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask.to(own.device), float("-inf"))
    if instead is not None or mask is not None:
        for index, nothing in enumerate((logits == float("-inf")).all(-1).tolist()):
            if nothing:
                raise ValueError(f"rows[{index}]: nothing is left to choose from")
    numbers = torch.stack([now.lane.numbers(now.drawn, logits) for now in progress])
    ids = torch.empty(len(progress), dtype=torch.long, device=own.device)
    alike: dict[tuple[float, int, float, float], list[int]] = {}
    for index, now in enumerate(progress):
        alike.setdefault(now.plan.filters, []).append(index)
    for filters, rows in alike.items():
        ids[rows] = sample(logits[rows], numbers[rows], *filters)
    if may_come is not None:  # of logits that are all -inf, the first that is allowed
        nothing = (logits == float("-inf")).all(-1)
        ids = torch.where(nothing, may_come.int().argmax(-1), ids)
    return _with_bytes(progress, ids, own, drew=True)


def given_bytes(
    progress: Sequence[Progress], rooms: Sequence[int | None], own: Tensor, ids: Tensor
) -> list[Progress]:
    """Take bytes ``(rows,)`` that the caller chose; as `sampled_bytes`."""
    for index, (now, room, token) in enumerate(zip(progress, rooms, ids.tolist(), strict=True)):
        allowed = now.allowed(room)
        if allowed is not None and not allowed[token]:
            raise ValueError(f"ids[{index}]: the plan does not allow {token} here")
    return _with_bytes(progress, ids.to(own.device, torch.long), own, drew=False)


def _with_bytes(
    progress: Sequence[Progress], ids: Tensor, own: Tensor, *, drew: bool
) -> list[Progress]:
    """Plans with bytes ``(rows,)``, and their log-probabilities where asked for."""
    log_probs = [0.0] * len(progress)
    if any(now.plan.log_probs for now in progress):
        log_probs = own.float().log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
    return [
        now.with_byte(token, log_prob, drew=drew)
        for now, token, log_prob in zip(progress, ids.tolist(), log_probs, strict=True)
    ]
