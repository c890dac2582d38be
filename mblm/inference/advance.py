"""Advances the stages of one hierarchy's decoding state, or of several side by side.

Several are sequences of different lengths: each is at its own position of its own patch. Where
compiled code runs, what they do at the same time is one call that reads the weights once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mblm.inference.sampling import Sampler
from mblm.inference.stage_cache import StageCache

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache

# A prefill takes in at most this many positions, and this many embedding values, at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22


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
    above = _joined([cache.stages[n - 1].output for cache, _ in anew])
    contexts = model.project_context(n - 1, above[:, None], caches[0].patch_linears[n - 1][1])
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
        outputs = step_natively([stage.cache for stage in stages], _joined(inputs))
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


def run_local(
    caches: Sequence["HierarchyCache"],
    pending: torch.Tensor | None,
    max_tokens: Sequence[int],
    sampler: Sampler,
    *,
    uniform: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Run the compiled local stage, each cache at most to the end of its patch.

    Args:
        caches: Some of one model.
        pending: The bytes that come first, ``(B,)`` int64 for all rows, appended already; or None.
        max_tokens: How many bytes to sample, per cache, >= 1.
        sampler: Draws them.
        uniform: Its random numbers, ``(B, most, V)``. Default: drawn as bytes are sampled.
        ends: ``(V,)`` bool: all end after such a byte.

    Returns:
        Per cache, the ids ``(rows, n)``, n >= 1. All but the last are taken in.
    """
    model = caches[0].model
    n = len(model.seq_lens) - 1
    stages = [cache.stages[n] for cache in caches]
    first = [stage.position for stage in stages]
    steps = [count - (pending is None) for count in max_tokens]
    if n > 0 or model.max_length is not None:
        room = (model.seq_lens[n] - position for position in first)
        steps = [min(pair) for pair in zip(steps, room, strict=True)]
    last = max(position + count for position, count in zip(first, steps, strict=True))
    positions, rotation = model.positions(n, 0, last)
    contexts = [stage.context for stage in stages if stage.context is not None]
    ids, outputs, num_tokens, num_steps = stages[0].cache.native.run(
        _joined([stage.output for stage in stages]),
        pending,
        list(max_tokens),
        steps,
        [t for stage, c in zip(stages, steps, strict=True) for t in stage.cache.native_state(c)],
        [stage.cache.position for stage in stages],
        first,
        model.local_table,
        positions,
        rotation,
        _joined(contexts) if contexts else None,
        caches[0].packed_logits,
        sampler.temperature,
        sampler.count_kept(model.num_tokens),
        sampler.top_p or 0.0,
        sampler.generator,
        uniform,
        ends,
    )
    sizes = [cache.batch_size for cache in caches]
    for stage, output, taken in zip(stages, outputs.split(sizes), num_steps, strict=True):
        stage.output = output
        stage.cache.position += taken
        stage.position += taken
    return [rows[:, :n] for rows, n in zip(ids.split(sizes), num_tokens, strict=True)]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _embed(cache: "HierarchyCache", n: int, ids: torch.Tensor) -> torch.Tensor:
    """The next positions of stage n from the bytes of their patches, ``(B, S, D_n)``."""
    stage, model = cache.stages[n], cache.model
    is_step = ids.shape[1] == model.patch_sizes[n]
    x = model.embed_tokens(n, ids, cache.patch_linears[n][0] if is_step else None)
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
