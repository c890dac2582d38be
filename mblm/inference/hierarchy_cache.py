"""The hierarchy's decoding state: one cache per stage, each fed only when its input is complete.

Bytes come in; a stage of patches takes in a position when the patch is complete *and* a byte after
it is wanted. A finished position is never revisited, for three reasons: the context of a patch
depends on the patches before it alone, positions are counted per stage, and the start token of a
stage gets no context, so that its output is the same for every sequence of the stage.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mblm.inference.stage_cache import StageCache, State, allocate_cache

# A prefill takes in at most this many positions, and this many embedding values, at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22


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
    def embed_tokens(self, stage: int, ids: torch.Tensor) -> torch.Tensor: ...
    def add_positions(self, stage: int, x: torch.Tensor, first: int = 0) -> torch.Tensor: ...
    def project_context(self, stage: int, attended: torch.Tensor) -> torch.Tensor: ...


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
    """

    def __init__(self, model: DecodableHierarchy, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.length = 0
        self._stages = [self._start(stage) for stage in range(len(model.seq_lens))]
        self._stages[0].restart(begin=0, context=None)
        # The bytes of the last patch of stage 1, which no stage above the local one has seen.
        device = model.to_logits.weight.device
        self._window = torch.empty(batch_size, 0, dtype=torch.long, device=device)

    def _start(self, stage: int) -> _Stage:
        limit = None
        if stage > 0 or self.model.max_length is not None:
            limit = 1 + self.model.seq_lens[stage]
        cache = allocate_cache(self.model.stage_models[stage], self.batch_size, limit)
        start_output = cache.step(self.model.start_token(stage, self.batch_size))
        return _Stage(cache, cache.snapshot(), start_output, start_output)

    def feed(self, ids: torch.Tensor) -> None:
        """Take in the next bytes, ids ``(B, L)`` int64 with L >= 1.

        Memory beyond the caches does not grow with L.
        """
        window_begin = self.length - self._window.shape[1]
        ids = torch.cat((self._window, ids), dim=1)
        self.length = window_begin + ids.shape[1]
        last = self.length - 1
        local = len(self._stages) - 1
        for n, stage in enumerate(self._stages):
            patch_size = self.model.patch_sizes[n]
            if n > 0:
                span = patch_size * self.model.seq_lens[n]
                begin = last // span * span
                if begin != stage.begin:
                    above = self._stages[n - 1].output
                    stage.restart(begin, self.model.project_context(n - 1, above[:, None]))
            # The local stage takes in every byte, the others the patches before the last byte's.
            count = (last - stage.begin) // patch_size + (n == local)
            if count > stage.position:
                first_byte = stage.begin + stage.position * patch_size - window_begin
                end = first_byte + (count - stage.position) * patch_size
                self._take_in(n, ids[:, first_byte:end])
        first_patch = last // self.model.patch_sizes[0] * self.model.patch_sizes[0]
        self._window = ids[:, first_patch - window_begin :].clone()

    def _take_in(self, n: int, ids: torch.Tensor) -> None:
        """Advance stage n over the patches of ``ids (B, S * R_n)``, in bounded chunks."""
        stage, patch_size = self._stages[n], self.model.patch_sizes[n]
        values = self.batch_size * patch_size * self.model.hidden_dims[-1]
        chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
        for part in ids.split(chunk * patch_size, dim=1):
            x = self.model.embed_tokens(n, part)
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
            cache_state, stage.begin, stage.position, stage.output, stage.context = saved
            stage.cache.restore(cache_state)
