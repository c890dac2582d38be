"""Advances the stages of one hierarchy's decoding state, or of several side by side.

Several are sequences of different lengths: each is at its own position of its own patch. Where
compiled code runs, what they do at the same time is one call that reads the weights once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mblm.inference.stage_cache import StageCache

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache

# A prefill takes in at most this many positions, and this many embedding values, at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22


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
    project = caches[0].project_context(n - 1)
    contexts = model.project_context(n - 1, above[:, None], project)
    sizes = [cache.batch_size for cache, _ in anew]
    for (cache, begin), context in zip(anew, contexts.split(sizes), strict=True):
        cache.stages[n].restart(begin, context)


def catch_up(caches: Sequence["HierarchyCache"], n: int) -> None:
    """Take in what stage n has not seen: every byte, or the patches before the last byte's."""
    missing = [(cache, cache.missing(n)) for cache in caches]
    missing = [(cache, ids) for cache, ids in missing if ids.shape[1]]
    patch_size = caches[0].model.patch_sizes[n]
    stages = [cache.stages[n] for cache, _ in missing]
    if (
        len(missing) > 1
        and all(ids.shape[1] == patch_size for _, ids in missing)
        and all(stage.cache.runs_natively(stage.output.dtype) for stage in stages)
    ):
        inputs = [_embed(cache, n, ids)[:, 0] for cache, ids in missing]
        outputs = step_natively([stage.cache for stage in stages], joined(inputs))
        sizes = [cache.batch_size for cache, _ in missing]
        for stage, output in zip(stages, outputs.split(sizes), strict=True):
            stage.output = output
            stage.position += 1
        return
    for cache, ids in missing:
        _take_in(cache, n, ids)


def step_natively(caches: Sequence[StageCache], x: torch.Tensor) -> torch.Tensor:
    """One position of all sequences of some caches of one compiled stage: ``(B, D) -> (B, D)``."""
    state = [tensor for cache in caches for tensor in cache.native_state(1)]
    y: torch.Tensor = caches[0].native.step(x, state, [cache.position for cache in caches])
    for cache in caches:
        cache.position += 1
    return y


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of several caches, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _embed(cache: "HierarchyCache", n: int, ids: torch.Tensor) -> torch.Tensor:
    """The next positions of stage n from the bytes of their patches, ``(B, S, D_n)``."""
    stage, model = cache.stages[n], cache.model
    is_step = ids.shape[1] == model.patch_sizes[n]
    x = model.embed_tokens(n, ids, cache.project_patch(n) if is_step else None)
    x = model.add_positions(n, x, stage.position)
    if stage.context is not None:
        x = x + stage.context[:, stage.position : stage.position + x.shape[1]]
    return x


def _take_in(cache: "HierarchyCache", n: int, ids: torch.Tensor) -> None:
    """Advance stage n over the patches of ``ids (B, S * R_n)``, in bounded chunks."""
    stage, patch_size = cache.stages[n], cache.model.patch_sizes[n]
    values = cache.batch_size * patch_size * cache.model.hidden_dims[-1]
    chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
    for part in ids.split(chunk * patch_size, dim=1):
        x = _embed(cache, n, part)
        if x.shape[1] == 1:
            stage.output = stage.cache.step(x[:, 0])
        else:
            stage.output = stage.cache.prefill(x)[:, -1].clone()
        stage.position += x.shape[1]
