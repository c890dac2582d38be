"""The hierarchy's decoding state: one cache per stage, each fed only when its input is complete.

Bytes come in; a stage of patches takes in a position when the patch is complete *and* a byte after
it is wanted. A finished position is never revisited, for three reasons: the context of a patch
depends on the patches before it alone, positions are counted per stage, and the start token of a
stage gets no context, so that its output is the same for every sequence of the stage.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from mblm.inference.packing import is_plain, pack_linear
from mblm.inference.sampling import Sampler
from mblm.inference.stage_cache import StageCache, State, allocate_cache

# A prefill takes in at most this many positions, and this many embedding values, at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22

Projection = Callable[[torch.Tensor], torch.Tensor]


class DecodableHierarchy(Protocol):
    """What decoding needs of a model; `mblm.model.hierarchy.Hierarchy` provides it."""

    num_tokens: int
    hidden_dims: Sequence[int]
    seq_lens: Sequence[int]
    patch_sizes: Sequence[int]
    stage_models: nn.ModuleList
    to_logits: nn.Linear

    @property
    def max_length(self) -> int | None: ...
    @property
    def context_size(self) -> int: ...
    def start_token(self, stage: int, batch_size: int) -> torch.Tensor: ...
    def empty_logits(self, batch_size: int) -> torch.Tensor: ...
    def embed_tokens(
        self, stage: int, ids: torch.Tensor, project: Projection | None = None
    ) -> torch.Tensor: ...
    def add_positions(self, stage: int, x: torch.Tensor, first: int = 0) -> torch.Tensor: ...
    def positions(
        self, stage: int, first: int, count: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]: ...
    @property
    def local_table(self) -> torch.Tensor: ...
    def project_context(
        self, stage: int, attended: torch.Tensor, project: Projection | None = None
    ) -> torch.Tensor: ...
    def linears_of_patches(self, stage: int) -> tuple[nn.Linear, nn.Linear]: ...


@dataclass
class _Stage:
    """One stage's sequence, which stands for the bytes from ``begin`` on."""

    cache: StageCache
    start_state: State  # of the cache after the start token
    start_output: torch.Tensor  # a_0, (B, D_n)
    output: torch.Tensor  # of the last position, (B, D_n)
    begin: int = -1  # first byte of the current sequence; -1 before there is one
    position: int = 0  # tokens taken in, the start token not counted
    context: torch.Tensor | None = None  # (B, P_n, D_n), from the stage above

    def restart(self, begin: int, context: torch.Tensor | None) -> None:
        if self.position:
            self.cache.restore(self.start_state)
        self.begin, self.position = begin, 0
        self.output, self.context = self.start_output, context


class HierarchyCache:
    """Decoding state of a model for ``batch_size`` equally long sequences.

    Attributes:
        length: Bytes taken in so far, the same for every sequence.
        weights: Type of the weights that compiled code reads.
    """

    def __init__(
        self, model: DecodableHierarchy, batch_size: int, weights: str = "float32"
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.weights = weights
        self._to_logits = (
            pack_linear(model.to_logits, weights) if is_plain(model.to_logits) else None
        )
        self.length = 0
        # Per stage, what stands in for the linear layers of its patches where one is taken in.
        self._patch_linears = [self._pack_patch_linears(n) for n in range(len(model.seq_lens))]
        self._stages = [self._start(stage) for stage in range(len(model.seq_lens))]
        self._stages[0].restart(begin=0, context=None)
        # The bytes of the last patch of stage 1, which no stage above the local one has seen.
        device = model.to_logits.weight.device
        self._window = torch.empty(batch_size, 0, dtype=torch.long, device=device)

    def _pack_patch_linears(self, stage: int) -> tuple[Projection | None, Projection | None]:
        if self.weights == "float32" or stage + 1 == len(self.model.seq_lens):
            return None, None
        embed, context = (
            partial(torch.ops.mblm.packed_linear, linear=pack_linear(linear, self.weights))
            if is_plain(linear)
            else None
            for linear in self.model.linears_of_patches(stage)
        )
        return embed, context

    def _start(self, stage: int) -> _Stage:
        limit = None
        if stage > 0 or self.model.max_length is not None:
            limit = 1 + self.model.seq_lens[stage]
        model = self.model.stage_models[stage]
        cache = allocate_cache(model, self.batch_size, limit, self.weights)
        start_output = cache.step(self.model.start_token(stage, self.batch_size))
        return _Stage(cache, cache.snapshot(), start_output, start_output)

    def feed(self, ids: torch.Tensor) -> None:
        """Take in the next bytes, ids ``(B, L)`` int64 with L >= 1.

        Memory beyond the caches does not grow with L.
        """
        self._append(ids)
        for n in range(len(self._stages)):
            self._begin_patch(n)
            self._catch_up(n)
        self._trim()

    def run(
        self,
        pending: torch.Tensor | None,
        max_tokens: int,
        sampler: Sampler,
        ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take in a byte and sample the next ones, at most to the end of the local patch.

        Args:
            pending: The byte to take in first, ``(B,)`` int64, or None.
            max_tokens: How many bytes to sample at most, >= 1.
            sampler: Draws them.
            ends: ``(V,)`` bool: a run ends after such a byte, whichever sequence it comes in.

        Returns:
            Ids ``(B, n)`` with n >= 1. All but the last are taken in.
        """
        local = self._stages[-1]
        # Before the first byte, a start token gets context: see `empty_logits`.
        is_empty = self.length == 0 and pending is None
        is_native = self._to_logits is not None and local.cache.runs_natively(local.output.dtype)
        if is_empty or not is_native:
            if pending is not None:
                self.feed(pending[:, None])
            return sampler(self.logits())[:, None]
        if pending is not None:
            self._append(pending[:, None])
            for n in range(len(self._stages) - 1):
                self._begin_patch(n)
                self._catch_up(n)
            self._begin_patch(len(self._stages) - 1)
        ids = self._run_local(pending, max_tokens, sampler, ends)
        if ids.shape[1] > 1:
            self._append(ids[:, :-1])
        if pending is not None or ids.shape[1] > 1:
            self._trim()
        return ids

    def _run_local(
        self,
        pending: torch.Tensor | None,
        max_tokens: int,
        sampler: Sampler,
        ends: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the compiled local stage; see `run`."""
        n = len(self._stages) - 1
        local, first = self._stages[n], self._stages[n].position
        steps = max_tokens - (pending is None)
        if n > 0 or self.model.max_length is not None:
            steps = min(steps, self.model.seq_lens[n] - first)
        positions, rotation = self.model.positions(n, first, steps)
        context = None if local.context is None else local.context[:, first:]
        ids, local.output, taken = local.cache.native.run(
            local.output,
            pending,
            max_tokens,
            steps,
            local.cache.native_state(steps),
            local.cache.position,
            self.model.local_table,
            positions,
            rotation,
            context,
            self._to_logits,
            sampler.temperature,
            sampler.count_kept(self.model.num_tokens),
            sampler.top_p or 0.0,
            sampler.generator,
            ends,
        )
        local.cache.position += taken
        local.position += taken
        return ids

    def _append(self, ids: torch.Tensor) -> None:
        self._window = torch.cat((self._window, ids), dim=1)
        self.length += ids.shape[1]

    def _trim(self) -> None:
        """Forget the bytes before the last patch of stage 1."""
        span = self.model.patch_sizes[0]
        kept = self.length - (self.length - 1) // span * span
        self._window = self._window[:, self._window.shape[1] - kept :].clone()

    def _begin_patch(self, n: int) -> None:
        """Start stage n anew if the last byte is the first of a patch of the stage above."""
        if n == 0:
            return
        stage = self._stages[n]
        span = self.model.patch_sizes[n] * self.model.seq_lens[n]
        begin = (self.length - 1) // span * span
        if begin != stage.begin:
            above = self._stages[n - 1].output
            project = self._patch_linears[n - 1][1]
            stage.restart(begin, self.model.project_context(n - 1, above[:, None], project))

    def _catch_up(self, n: int) -> None:
        """Take in what stage n has not seen: every byte, or the patches before the last byte's."""
        stage, patch_size = self._stages[n], self.model.patch_sizes[n]
        is_local = n + 1 == len(self._stages)
        count = (self.length - 1 - stage.begin) // patch_size + is_local
        if count > stage.position:
            window_begin = self.length - self._window.shape[1]
            first_byte = stage.begin + stage.position * patch_size - window_begin
            end = first_byte + (count - stage.position) * patch_size
            self._take_in(n, self._window[:, first_byte:end])

    def _take_in(self, n: int, ids: torch.Tensor) -> None:
        """Advance stage n over the patches of ``ids (B, S * R_n)``, in bounded chunks."""
        stage, patch_size = self._stages[n], self.model.patch_sizes[n]
        values = self.batch_size * patch_size * self.model.hidden_dims[-1]
        chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
        for part in ids.split(chunk * patch_size, dim=1):
            is_step = part.shape[1] == patch_size
            x = self.model.embed_tokens(n, part, self._patch_linears[n][0] if is_step else None)
            count = x.shape[1]
            x = self.model.add_positions(n, x, stage.position)
            if stage.context is not None:
                x = x + stage.context[:, stage.position : stage.position + count]
            if count == 1:
                stage.output = stage.cache.step(x[:, 0])
            else:
                stage.output = stage.cache.prefill(x)[:, -1].clone()
            stage.position += count

    def logits(self) -> torch.Tensor:
        """Logits of the next byte, ``(B, V)``."""
        if self.length == 0:
            return self.model.empty_logits(self.batch_size)[:, 0]
        return self.model.to_logits(self._stages[-1].output)

    def fork(self) -> "HierarchyCache":
        """An independent copy; what never changes is shared."""
        other = copy.copy(self)
        other._stages = []
        for n, stage in enumerate(self._stages):
            twin = copy.copy(stage)
            twin.cache = allocate_cache(self.model.stage_models[n], self.batch_size, None)
            twin.cache.native = stage.cache.native
            twin.cache.restore(stage.cache.snapshot())
            other._stages.append(twin)
        return other

    def snapshot(self) -> State:
        """Everything that changes, as a nest of lists with tensors and integers as leaves."""
        stages = [
            [stage.cache.snapshot(), stage.begin, stage.position, stage.output, stage.context]
            for stage in self._stages
        ]
        return [self.length, self._window, stages]

    def restore(self, state: State) -> None:
        """Go back to a snapshot, which stays intact."""
        self.length, self._window, stages = state
        for stage, saved in zip(self._stages, stages, strict=True):
            cache_state, begin, position, stage.output, stage.context = saved
            stage.begin, stage.position = operator.index(begin), operator.index(position)
            stage.cache.restore(cache_state)
