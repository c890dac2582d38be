"""Advances the stages of one hierarchy's decoding state, or of several side by side.

Several are sequences of different lengths: each is at its own position of its own patch. Where
compiled code runs, what they do at the same time is one call that reads the weights once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mblm.inference.stage_cache import StageCache

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import DecodableHierarchy, HierarchyCache

# A prefill takes in at most this many positions, and this many embedding values, at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22


def feed(caches: Sequence["HierarchyCache"], ids: Sequence[torch.Tensor]) -> None:
    """Take in the next bytes of each, ids ``(B, L)`` int64 with L >= 1.

    Memory beyond the caches does not grow with L.
    """
    for cache, part in zip(caches, ids, strict=True):
        cache.append(part)
    for n in range(len(caches[0].stages)):
        begin_patch(caches, n)
        catch_up(caches, n)
    for cache in caches:
        cache.trim()


def begin_local_patch(caches: Sequence["HierarchyCache"]) -> None:
    """Where the byte appended last is the first of a patch, have the stages above catch up."""
    last = len(caches[0].stages) - 1
    for n in range(last):
        begin_patch(caches, n)
        catch_up(caches, n)
    begin_patch(caches, last)


def begin_patch(caches: Sequence["HierarchyCache"], n: int) -> None:
    """Start stage n anew wherever the last byte is the first of a patch of the stage above."""
    if n == 0:
        return
    model = caches[0].model
    span = model.patch_sizes[n] * model.seq_lens[n]
    begins = [(cache.length - 1) // span * span for cache in caches]
    pairs = zip(caches, begins, strict=True)
    anew = [(cache, begin) for cache, begin in pairs if begin != cache.stages[n].begin]
    if not anew:
        return
    above = joined([cache.stages[n - 1].output for cache, _ in anew])
    project = caches[0].project_context(n - 1, len(above))
    contexts = model.project_context(n - 1, above[:, None], project)
    sizes = [cache.batch_size for cache, _ in anew]
    for (cache, begin), context in zip(anew, contexts.split(sizes), strict=True):
        cache.stages[n].restart(begin, after_autocast(context, model))


def catch_up(caches: Sequence["HierarchyCache"], n: int) -> None:
    """Take in what stage n has not seen: every byte, or the patches before the last byte's."""
    groups: dict[int, list[tuple[HierarchyCache, torch.Tensor]]] = {}  # by how many are missing
    for cache in caches:
        ids = cache.missing(n)
        if ids.shape[1]:
            groups.setdefault(ids.shape[1], []).append((cache, ids))
    for group in groups.values():
        _take_in([cache for cache, _ in group], n, joined([ids for _, ids in group]))


def prefill_natively(caches: Sequence[StageCache], x: torch.Tensor) -> torch.Tensor:
    """The next positions of all sequences of some caches of one compiled stage, ``(B, S, D)``."""
    count = x.shape[1]
    state = [tensor for cache in caches for tensor in cache.native_state(count)]
    y: torch.Tensor = caches[0].native.prefill(x, state, [cache.position for cache in caches])
    for cache in caches:
        cache.position += count
    return y


def after_autocast(tensor: torch.Tensor, model: "DecodableHierarchy") -> torch.Tensor:
    """In the model's own dtype: when what is kept is read, autocast may have ended."""
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor.to(model.dtype)
    return tensor


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of several caches, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take_in(caches: Sequence["HierarchyCache"], n: int, ids: torch.Tensor) -> None:
    """Advance stage n over the patches of ``ids (B, S * R_n)``, in bounded chunks."""
    model = caches[0].model
    stages = [cache.stages[n] for cache in caches]
    sizes = [cache.batch_size for cache in caches]
    patch_size = model.patch_sizes[n]
    values = len(ids) * patch_size * model.hidden_dims[-1]
    chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
    for part in ids.split(chunk * patch_size, dim=1):
        x = _embed(caches, n, part)
        count = x.shape[1]
        outputs = _prefill([stage.cache for stage in stages], x, sizes)
        for stage, output in zip(stages, outputs, strict=True):
            stage.output = after_autocast(output, model)
            stage.position += count


def _embed(caches: Sequence["HierarchyCache"], n: int, ids: torch.Tensor) -> torch.Tensor:
    """The next positions of stage n from the bytes of their patches, ``(B, S, D_n)``."""
    model = caches[0].model
    count = ids.shape[1] // model.patch_sizes[n]
    project = caches[0].project_patch(n, len(ids) * count)
    rows = []
    embedded = model.embed_tokens(n, ids, project).split([cache.batch_size for cache in caches])
    for cache, x in zip(caches, embedded, strict=True):
        stage = cache.stages[n]
        x = model.add_positions(n, x, stage.position)
        if stage.context is not None:
            x = x + stage.context[:, stage.position : stage.position + count]
        rows.append(x)
    return joined(rows)


def _prefill(
    caches: Sequence[StageCache], x: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """The last outputs ``(rows, D)`` of each cache for their rows of ``x (B, S, D)``."""
    if len(caches) > 1 and all(cache.prefills_natively(x) for cache in caches):
        return list(prefill_natively(caches, x)[:, -1].split(sizes))
    return [
        cache.step(part[:, 0]) if part.shape[1] == 1 else cache.prefill(part)[:, -1].clone()
        for cache, part in zip(caches, x.split(sizes), strict=True)
    ]
