"""The hierarchy's decoding state: one cache per stage, each fed only when its input is complete.

Bytes come in; a stage of patches takes in a position when the patch is complete *and* a byte after
it is wanted. A finished position is never revisited, for three reasons: the context of a patch
depends on the patches before it alone, positions are counted per stage, and the start token of a
stage gets no context, so that its output is the same for every sequence of the stage.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from mblm.inference.advance import after_autocast, feed
from mblm.inference.device_run import DeviceRun
from mblm.inference.native_hierarchy import build_native
from mblm.inference.packing import Guard, guard
from mblm.inference.sampling import Sampler
from mblm.inference.stage_cache import (
    NATIVE_POSITIONS,
    StageCache,
    State,
    allocate_cache,
    computes_natively,
)
from mblm.model.plain import Part
from mblm.ops.packing import is_on_gpu, pack_linear
from mblm.utils.huge_pages import HugePages

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
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
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
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
    def parts_of_patches(
        self, stage: int
    ) -> tuple[nn.Embedding, nn.LayerNorm, nn.Linear, nn.LayerNorm, nn.Linear]: ...
    def parts_between(self, stage: int) -> Iterable[Part]: ...
    def parts_around(self, first: int) -> Iterable[Part]: ...


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
        native: Samples in compiled code on a CPU; None where not even the local stage is compiled.
        device_run: Samples on a GPU; None where not all stages are compiled.
        goes_on: Whether compiled code has sampled last and has all stages, so that nothing of the
            user's runs with the next byte.
    """

    goes_on = False

    def __init__(
        self, model: DecodableHierarchy, batch_size: int, weights: str = "float32"
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.weights = weights
        memory = HugePages()
        # What compiled code cannot stand in for has no guard and nothing packed.
        self._guard_of_logits = guard([(model.to_logits, nn.Linear)])
        self.packed_logits: list[torch.Tensor] = []
        if self._guard_of_logits is not None:
            self.packed_logits = pack_linear(model.to_logits, weights, memory)
        # Per upper stage, the linear layers of its patches and of its context.
        self.packed_patches: list[list[list[torch.Tensor]]] = []
        self._guards_between: list[Guard | None] = []
        for n in range(len(model.seq_lens) - 1):
            self._guards_between.append(guard(model.parts_between(n)))
            linears = model.parts_of_patches(n)[2::2] if self._guards_between[n] else ()
            self.packed_patches.append([pack_linear(p, weights, memory) for p in linears])
        self.length = 0
        self.stages = [self._start(stage) for stage in range(len(model.seq_lens))]
        self.stages[0].restart(begin=0, context=None)
        # The bytes of the last patch of stage 1, which no stage above the local one has seen.
        self.window = torch.empty(batch_size, 0, dtype=torch.long, device=model.device)
        native = build_native(self)
        is_on_device = is_on_gpu(self.window)
        self.native = None if is_on_device else native
        self.device_run = DeviceRun(native) if is_on_device and native is not None else None

    def project_patch(self, n: int, positions: int) -> Projection | None:
        """What stands in for the linear layer of patches of stage n, so many at a time."""
        return self._packed(n, 0, positions)

    def project_context(self, n: int, positions: int) -> Projection | None:
        """What stands in for the linear layer of stage n's context, for so many positions."""
        return self._packed(n, 1, positions)

    def _packed(self, n: int, index: int, positions: int) -> Projection | None:
        if n + 1 == len(self.stages) or positions > NATIVE_POSITIONS:
            return None
        if not computes_natively(self.stages[n].output.dtype):
            return None
        own = self._guards_between[n]
        if own is None or not own.holds():
            return None
        return partial(torch.ops.mblm.packed_linear, linear=self.packed_patches[n][index])

    def _start(self, stage: int) -> _Stage:
        limit = None
        if stage > 0 or self.model.max_length is not None:
            limit = 1 + self.model.seq_lens[stage]
        model = self.model.stage_models[stage]
        cache = allocate_cache(model, self.batch_size, limit, self.weights)
        start_output = cache.step(self.model.start_token(stage, self.batch_size))
        start_output = after_autocast(start_output, self.model)
        return _Stage(cache, cache.snapshot(), start_output, start_output)

    def feed(self, ids: torch.Tensor) -> None:
        """Take in the next bytes, ids ``(B, L)`` int64 with L >= 1."""
        feed([self], [ids])

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
        self.goes_on = False
        if self.native is None or not self.can_run(pending):
            if pending is not None:
                self.feed(pending[:, None])
            return sampler(self.logits())[:, None]
        (ids,) = self.native.run([self], pending, [max_tokens], sampler, ends=ends)
        self.goes_on = self.native.first == 0
        return ids

    def can_run(self, pending: torch.Tensor | None) -> bool:
        """Whether compiled code samples what comes next."""
        # Before the first byte, a start token gets context: see `empty_logits`.
        is_empty = self.length == 0 and pending is None
        return self.native is not None and not is_empty and self.native.runs(self)

    def append_run(self, ids: torch.Tensor) -> None:
        """Note the bytes that compiled code took in: all of ``ids`` but the last."""
        if ids.shape[1] > 1:
            self.append(ids[:, :-1])
        self.trim()

    def append(self, ids: torch.Tensor) -> None:
        """Note the next bytes, which no stage has taken in yet."""
        self.window = torch.cat((self.window, ids), dim=1)
        self.length += ids.shape[1]

    def trim(self) -> None:
        """Forget the bytes before the last patch of stage 1."""
        span = self.model.patch_sizes[0]
        kept = self.length - (self.length - 1) // span * span
        self.window = self.window[:, self.window.shape[1] - kept :].clone()

    def missing(self, n: int) -> torch.Tensor:
        """The bytes that stage n can take in and has not, of whole patches: ``(B, S * R_n)``."""
        stage, patch_size = self.stages[n], self.model.patch_sizes[n]
        is_local = n + 1 == len(self.stages)
        count = (self.length - 1 - stage.begin) // patch_size + is_local
        window_begin = self.length - self.window.shape[1]
        first_byte = stage.begin + stage.position * patch_size - window_begin
        end = first_byte + max(0, count - stage.position) * patch_size
        return self.window[:, first_byte:end]

    def logits(self) -> torch.Tensor:
        """Logits of the next byte, ``(B, V)``."""
        if self.length == 0:
            return self.model.empty_logits(self.batch_size)[:, 0]
        output = self.stages[-1].output
        own = self._guard_of_logits
        if own is not None and own.holds() and computes_natively(output.dtype):
            return torch.ops.mblm.packed_linear(output, self.packed_logits)
        return self.model.compute_logits(output)

    def fork(self) -> "HierarchyCache":
        """An independent copy; what never changes is shared."""
        other = self._without_stages()
        for n, stage in enumerate(self.stages):
            twin = copy.copy(stage)
            twin.cache = self._empty_cache(n, self.batch_size)
            twin.cache.restore(stage.cache.snapshot())
            other.stages.append(twin)
        return other

    def split(self) -> list["HierarchyCache"]:
        """Independent copies of one sequence each.

        Raises:
            ValueError: A custom stage's state cannot be split.
        """
        return [self._row(slice(row, row + 1)) for row in range(self.batch_size)]

    def _row(self, row: slice) -> "HierarchyCache":
        other = self._without_stages()
        other.batch_size = 1
        other.window = self.window[row].clone()
        for n, stage in enumerate(self.stages):
            cache = self._empty_cache(n, 1)
            start_state = stage.cache.rows_of_state(stage.start_state, row)
            cache.restore(stage.cache.rows_of_state(stage.cache.snapshot(), row))
            context = None if stage.context is None else stage.context[row].clone()
            start_output, output = stage.start_output[row].clone(), stage.output[row].clone()
            other.stages.append(
                _Stage(
                    cache, start_state, start_output, output, stage.begin, stage.position, context
                )
            )
        return other

    def _without_stages(self) -> "HierarchyCache":
        other = copy.copy(self)
        other.stages = []
        if self.device_run is not None:
            other.device_run = self.device_run.fork()
        return other

    def _empty_cache(self, n: int, batch_size: int) -> StageCache:
        own = self.stages[n].cache
        cache = own.empty(batch_size)
        if cache is None:
            cache = allocate_cache(self.model.stage_models[n], batch_size, None)
        cache.native, cache.guard = own.native, own.guard
        return cache

    def snapshot(self) -> State:
        """Everything that changes, as a nest of lists with tensors and integers as leaves."""
        stages = [
            [stage.cache.snapshot(), stage.begin, stage.position, stage.output, stage.context]
            for stage in self.stages
        ]
        return [self.length, self.window, stages]

    def restore(self, state: State) -> None:
        """Go back to a snapshot, which stays intact."""
        self.length, self.window, stages = state
        for stage, saved in zip(self.stages, stages, strict=True):
            cache_state, begin, position, stage.output, stage.context = saved
            stage.begin, stage.position = operator.index(begin), operator.index(position)
            stage.cache.restore(cache_state)
