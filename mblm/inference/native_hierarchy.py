"""A model's stages in compiled code: they sample many bytes in one call.

All stages, or the local one alone where there is one above it that is not compiled.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mblm.inference.advance import begin_local_patch, joined
from mblm.inference.packing import Guard, guard
from mblm.inference.sampling import Sampler
from mblm.inference.stage_cache import computes_natively
from mblm.ops.packing import NONE, is_on_gpu

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache


class NativeHierarchy:
    """The stages from ``first`` on in compiled code.

    It holds weights and no state: what it works on are the caches that it is given.

    Attributes:
        compiled: The weights, ``torch.classes.mblm.Hierarchy``.
    """

    def __init__(self, cache: "HierarchyCache", first: int, watched: Guard) -> None:
        model = cache.model
        self.first = first
        self._guard = watched
        tensors = [model.local_table, *cache.packed_logits]
        eps: list[float] = []
        for n in range(first, len(model.seq_lens) - 1):
            embedding, flat_norm, _, norm, _ = model.parts_of_patches(n)
            project, context = cache.packed_patches[n]
            tensors += [embedding.weight, flat_norm.weight, flat_norm.bias, *project]
            tensors += [norm.weight, norm.bias, *context]
            eps += [flat_norm.eps, norm.eps]
        self.compiled = torch.ops.mblm.hierarchy(
            [stage.cache.native for stage in cache.stages[first:]],
            list(model.seq_lens[first:]),
            [tensor.detach() for tensor in tensors],
            eps,
        )

    def runs(self, cache: "HierarchyCache") -> bool:
        """Whether it computes what the stages do, here and now."""
        dtypes = {stage.output.dtype for stage in cache.stages[self.first :]}
        return all(map(computes_natively, dtypes)) and self._guard.holds()

    def run(
        self,
        caches: Sequence["HierarchyCache"],
        pending: torch.Tensor | None,
        max_tokens: Sequence[int],
        sampler: Sampler,
        *,
        uniform: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Take in a byte and sample the next ones, in several caches side by side.

        Args:
            caches: Some of one model.
            pending: The bytes to take in first, ``(B,)`` int64 for all rows, or None.
            max_tokens: How many bytes to sample at most, per cache, >= 1.
            sampler: Draws them.
            uniform: Its random numbers, ``(B, most, V)``. Default: drawn as bytes are sampled.
            ends: ``(V,)`` bool: all end after such a byte.

        Returns:
            Per cache, the ids ``(rows, n)``, n >= 1. All but the last are taken in. They are fewer
            than asked for where the local patch ends and a stage above is not compiled.
        """
        model = caches[0].model
        indices = range(self.first, len(model.seq_lens))
        stages = [[cache.stages[n] for cache in caches] for n in indices]
        begins_patches = len(stages) > 1
        sizes = [cache.batch_size for cache in caches]
        if pending is not None and not begins_patches:
            for cache, byte in zip(caches, pending.split(sizes), strict=True):
                cache.append(byte[:, None])
            begin_local_patch(caches)
        room = [
            _room(cache, count - (pending is None))
            for cache, count in zip(caches, max_tokens, strict=True)
        ]
        ends_of = [self._ends(caches, n, room, max_tokens) for n in indices]
        state: list[torch.Tensor] = []
        tables: list[torch.Tensor] = []
        for n, row, ends_of_row in zip(indices, stages, ends_of, strict=True):
            for stage, end in zip(row, ends_of_row, strict=True):
                state += stage.cache.native_state(end - stage.position)
                if n > self.first:
                    state += stage.cache.native_start(stage.start_state)
            positions = model.positions(n, 0, max(ends_of_row))
            tables += [NONE if table is None else table for table in positions]
        ids, outputs, contexts, new_positions, num_tokens = self.compiled.run(
            state,
            [stage.cache.position for row in stages for stage in row],
            [stage.position for row in stages for stage in row],
            [joined([stage.output for stage in row]) for row in stages],
            [joined([stage.start_output for stage in row]) for row in stages],
            [_contexts(row, model.seq_lens[n]) for n, row in zip(indices, stages, strict=True)],
            tables,
            [cache.window for cache in caches],
            [cache.length for cache in caches],
            pending,
            list(max_tokens),
            room,
            sampler.temperature,
            sampler.count_kept(model.num_tokens),
            sampler.top_p or 0.0,
            sampler.generator,
            uniform,
            ends,
        )
        runs = [part[:, :n] for part, n in zip(ids.split(sizes), num_tokens, strict=True)]
        if begins_patches and pending is not None:
            for cache, byte in zip(caches, pending.split(sizes), strict=True):
                cache.append(byte[:, None])
        for cache, run in zip(caches, runs, strict=True):
            cache.append_run(run)
        numbers = iter(new_positions)
        for n, row, output, context in zip(indices, stages, outputs, contexts, strict=True):
            parts = context.split(sizes) if context.numel() else [None] * len(row)
            for cache, stage, own, own_context in zip(
                caches, row, output.split(sizes), parts, strict=True
            ):
                stage.output, stage.position = own, next(numbers)
                stage.cache.position = 1 + stage.position
                if n > self.first:
                    span = model.patch_sizes[n] * model.seq_lens[n]
                    stage.begin, stage.context = (cache.length - 1) // span * span, own_context
        return runs

    def _ends(
        self,
        caches: Sequence["HierarchyCache"],
        n: int,
        room: Sequence[int],
        max_tokens: Sequence[int],
    ) -> list[int]:
        """The positions that stage n may come to, per cache."""
        model = caches[0].model
        if n > self.first:
            return [model.seq_lens[n]] * len(caches)
        positions = [cache.stages[n].position for cache in caches]
        if n + 1 == len(model.seq_lens):
            return [position + left for position, left in zip(positions, room, strict=True)]
        counts = zip(caches, max_tokens, strict=True)
        complete = [(cache.length + count) // model.patch_sizes[n] for cache, count in counts]
        return [max(pair) for pair in zip(positions, complete, strict=True)]


def build_native(cache: "HierarchyCache") -> NativeHierarchy | None:
    """All stages, or on a CPU the local one alone; None where not even that is compiled."""
    firsts = {0} if is_on_gpu(cache.window) else {0, len(cache.stages) - 1}
    for first in sorted(firsts):
        guards = [guard(cache.model.parts_around(first))]
        guards += [stage.cache.guard for stage in cache.stages[first:]]
        if None not in guards:
            watched = [part for own in guards if own is not None for part in own.parts]
            return NativeHierarchy(cache, first, Guard(watched))
    return None


def _room(cache: "HierarchyCache", steps: int) -> int:
    """How many positions the local patch has left, or so many as are wanted where none ends."""
    local, model = cache.stages[-1], cache.model
    if len(cache.stages) == 1 and model.max_length is None:
        return steps
    return model.seq_lens[-1] - local.position if local.begin >= 0 else 0


def _contexts(stages: Sequence[Any], seq_len: int) -> torch.Tensor:
    """Contexts of one stage in several caches, ``(B, P_n, D_n)``; zeros where there is none yet."""
    if all(stage.context is None for stage in stages):
        return NONE
    return joined(
        [
            stage.output.new_zeros(stage.output.shape[0], seq_len, stage.output.shape[1])
            if stage.context is None
            else stage.context
            for stage in stages
        ]
    )
