"""Runs on a GPU: many bytes are sampled without the host, which reads them a patch later.

All state is on the GPU while bytes are sampled, positions and lengths included. What is queued is
made of the units of ``torch.classes.mblm.DeviceRun``:

- a *step* takes in the pending byte and samples the next;
- a *turn* is the step of a patch's last byte. The stages above take in the patch on another stream,
  beside it; then the local stage starts anew with its new context.

A turn and the steps of the rest of the patch are queued together; from the second time on they are
one CUDA graph. Two such units are queued at once, so that the GPU goes on while the host reads.

After a byte that may end generation the kernels write nothing more, so that what was queued ahead
changes nothing: the state is that after the byte. Random numbers that were drawn ahead are given
back. Units taken in beside that byte by the stages above are ahead of it, which is as good.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mblm.inference.native_hierarchy import NativeHierarchy
from mblm.inference.sampling import Sampler

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache

# Bytes of one unit, at most.
_SLOTS = 32
_QUEUED_UNITS = 2
_FIRST_LIMIT = 64
_NONE = torch.empty(0)


@dataclass(frozen=True)
class _Unit:
    """What is queued at once: a turn, if ``level`` is given, and steps.

    Attributes:
        count: Bytes that it samples.
        level: Of a turn, the most global stage that takes in a patch.
        takes: Whether a byte is taken in before each is sampled.
    """

    count: int
    level: int | None = None
    takes: bool = True


@dataclass
class _Queued:
    """A unit on its way.

    Attributes:
        length: Bytes taken in before it.
        ids: Its bytes ``(count, B)`` on the CPU, as soon as ``event`` has come.
        numbers: The generator's state before it, where that may be needed.
    """

    unit: _Unit
    length: int
    ids: torch.Tensor
    event: torch.cuda.Event | None
    numbers: torch.Tensor | None

    def wait(self) -> torch.Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.ids


class DeviceRun:
    """Samples with one decoding state on a GPU.

    Attributes:
        graphs: Whether units become CUDA graphs. A switch to measure by.
    """

    graphs = True

    def __init__(self, native: NativeHierarchy) -> None:
        self._native = native
        self._bound: _Bound | None = None

    def fork(self) -> "DeviceRun":
        """For another state of the same model."""
        return DeviceRun(self._native)

    def runs(self, cache: "HierarchyCache") -> bool:
        """Whether it computes what the stages do, here and now."""
        return self._native.runs(cache)

    def sample(
        self,
        cache: "HierarchyCache",
        num_tokens: int,
        sampler: Sampler,
        ends: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield ``num_tokens`` sampled bytes, ids ``(B,)`` on the CPU; the last is not taken in.

        Args:
            cache: What they come after. Whenever nothing more is asked for, it has taken in all
                bytes but the last of those that were queued.
            num_tokens: How many.
            sampler: Draws them.
            ends: ``(V,)`` bool: nothing after such a byte, whichever sequence it comes in, is taken
                in or drawn before the byte has been yielded.
        """
        if num_tokens < 1:
            return
        token: torch.Tensor | None = None
        if cache.length == 0:  # here a start token gets context: see `empty_logits`
            token = sampler(cache.logits())
            num_tokens -= 1
            yield token.cpu()
        if num_tokens:
            state = _Sampling(self._bind(cache, num_tokens), cache, sampler, ends, self.graphs)
            try:
                yield from state.run(token, num_tokens)
            finally:
                state.settle()

    def _bind(self, cache: "HierarchyCache", num_tokens: int) -> "_Bound":
        """Buffers for a state, with room for so many bytes more."""
        model = cache.model
        most = (cache.length + num_tokens) // model.patch_sizes[0]
        limit = max(_FIRST_LIMIT, 1 << (most - 1).bit_length())
        if model.max_length is not None:
            limit = model.seq_lens[0]
        bound = self._bound
        if bound is not None and bound.limit >= most:
            limit = bound.limit
        limits = [limit, *model.seq_lens[1:]]
        state = [
            stage.cache.native_state(limit - stage.position)
            for stage, limit in zip(cache.stages, limits, strict=True)
        ]
        places = [tensor.data_ptr() for part in state for tensor in part]
        if bound is None or (bound.limit, bound.places) != (limit, places):
            self._bound = bound = None  # which frees what is not needed any more
            self._bound = bound = _Bound(self._native, cache, limits, state)
        return bound


class _Bound:
    """The tensors that a run works on, beside those of the caches, and graphs of its units."""

    def __init__(
        self,
        native: NativeHierarchy,
        cache: "HierarchyCache",
        limits: list[int],
        state: list[list[torch.Tensor]],
    ) -> None:
        model, batch = cache.model, cache.batch_size
        self.model = model
        self.limit = limits[0]
        self.places = [tensor.data_ptr() for part in state for tensor in part]
        self.device = model.to_logits.weight.device
        self.slots = _SLOTS

        def integers(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        vocabulary = model.num_tokens
        self.flags = integers(2, dtype=torch.int32)
        self.settings = integers(3, dtype=torch.float32)
        self.ends = integers(vocabulary, dtype=torch.bool)
        self.next = integers(batch)
        self.history = integers(batch, model.patch_sizes[0])
        self.pending = integers(batch)
        self.uniform = integers(self.slots, batch, vocabulary, dtype=torch.float32)
        self.ids = integers(self.slots, batch)
        tensors = [self.flags, self.settings, self.ends, self.next, self.history]
        tensors += [self.pending, self.uniform, self.ids]
        self.positions, self.outputs, self.contexts = [], [], []
        for n, stage in enumerate(cache.stages):
            self.positions.append(integers(batch))
            self.outputs.append(stage.output.new_empty(stage.output.shape))
            context = _NONE
            if n > 0:
                context = stage.output.new_zeros(batch, model.seq_lens[n], stage.output.shape[1])
            self.contexts.append(context)
            tensors += [self.positions[n], self.outputs[n], stage.start_output.contiguous()]
            tensors.append(context)
            tables = model.positions(n, 0, limits[n])
            tensors += [_NONE if table is None else table.contiguous() for table in tables]
            if n > 0:
                state[n] = [*state[n], *stage.cache.native_start(stage.start_state)]
            tensors += state[n]
        # The local stage's output at the end of a patch, from which the next byte is sampled.
        self.last_output = torch.empty_like(self.outputs[-1])
        self._compiled = torch.ops.mblm.device_run(
            native.compiled, [t.detach() for t in tensors], [len(part) for part in state], limits
        )
        self._is_cuda = self.device.type == "cuda"
        self._beside = torch.cuda.Stream(self.device) if self._is_cuda else None
        self._graphs: dict[_Unit, torch.cuda.CUDAGraph | None] = {}

    def load(self, cache: "HierarchyCache", sampler: Sampler, ends: torch.Tensor | None) -> None:
        """Take over a state and what is asked for."""
        kept = float(sampler.count_kept(self.model.num_tokens))
        top_p = sampler.top_p or 0.0
        if top_p:  # too small a number for a float keeps the likeliest, as 0 would not
            top_p = max(top_p, torch.finfo(torch.float32).tiny)
        self.settings.copy_(torch.tensor([sampler.temperature, top_p, kept]))
        self.flags.zero_()
        if ends is None:
            self.ends.zero_()
        else:
            self.ends.copy_(ends)
        self.next.fill_(cache.length % self.model.patch_sizes[0])
        self.history[:, : cache.window.shape[1]] = cache.window
        for n, stage in enumerate(cache.stages):
            self.positions[n].fill_(stage.position)
            self.outputs[n].copy_(stage.output)
            if stage.context is not None:
                self.contexts[n].copy_(stage.context)

    def play(self, unit: _Unit, graphs: bool) -> None:
        """Queue a unit; from the second time on, as a graph."""
        if not (graphs and self._is_cuda):
            self._queue(unit)
        elif unit not in self._graphs:
            self._graphs[unit] = None
            self._queue(unit)  # which also loads the kernels
        else:
            graph = self._graphs[unit]
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._queue(unit)
                self._graphs[unit] = graph
            graph.replay()

    def _queue(self, unit: _Unit) -> None:
        run = self._compiled
        if not unit.takes:
            run.sample(0)
            return
        for slot in range(unit.count):
            run.embed_byte()
            if slot > 0 or unit.level is None:
                run.step_and_sample(slot)
                continue
            with self._fork():
                self.begin_patches(unit.level)
            run.step_and_sample(0)
            self._join()
            self.begin_local_patch()

    def begin_patches(self, level: int) -> None:
        """The stages above the local one, of which that at ``level`` takes in a patch.

        Those below it start anew; -1 is before the first byte.
        """
        if level >= 0:
            self._compiled.take_patch(level)
        for n in range(max(level, 0) + 1, len(self.outputs) - 1):
            self._compiled.begin_anew(n)

    def begin_local_patch(self) -> None:
        self.last_output.copy_(self.outputs[-1])
        self._compiled.begin_anew(len(self.outputs) - 1)

    def _fork(self) -> AbstractContextManager[Any]:
        if self._beside is None:
            return nullcontext()
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._beside)

    def _join(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)


class _Sampling:
    """One call of `DeviceRun.sample`.

    Attributes:
        length: Bytes taken in when all that is queued is done.
        is_ahead: Whether the stages above the local one are where the next byte wants them.
        is_begun: Whether the local stage is, too. Both are told apart only at a patch's end.
    """

    def __init__(
        self,
        bound: _Bound,
        cache: "HierarchyCache",
        sampler: Sampler,
        ends: torch.Tensor | None,
        graphs: bool,
    ) -> None:
        self.bound, self.cache, self.sampler, self.graphs = bound, cache, sampler, graphs
        self.ends = None if ends is None else ends.cpu()
        self.length = cache.length
        self.patch_size = cache.model.seq_lens[-1]
        self.has_stages_above = len(cache.stages) > 1
        level = self._level(self.length)
        above = cache.stages[max(level, 0)]
        size = cache.model.patch_sizes[max(level, 0)]
        self.is_ahead = (
            level >= 0 and self.length > 0 and above.position == (self.length - above.begin) // size
        )
        self.is_begun = False
        self._stream = torch.cuda.current_stream(bound.device) if bound._is_cuda else None
        with self._on_stream():
            bound.load(cache, sampler, ends)

    def run(self, token: torch.Tensor | None, num_tokens: int) -> Iterator[torch.Tensor]:
        """Yield bytes; ``token`` is the one to take in first."""
        has_pending = token is not None
        if token is not None:
            with self._on_stream():
                self.bound.pending.copy_(token)
        queued: deque[_Queued] = deque()
        left = num_tokens
        while left or queued:
            while left and len(queued) < _QUEUED_UNITS:
                unit = self._next(left) if has_pending else _Unit(1, takes=False)
                with self._on_stream():
                    queued.append(self._play(unit))
                left -= unit.count
                has_pending = True
            unit_done = queued.popleft()
            ids = unit_done.wait()
            valid = self._count_until_end(ids)
            if valid is not None:
                left = self._go_back(unit_done, valid, left, queued)
                ids = ids[:valid]
            yield from ids.unbind()

    def settle(self) -> None:
        """Give the state back to the cache."""
        cache, bound, length = self.cache, self.bound, self.length
        if length == 0:
            return
        model, last = cache.model, len(cache.stages) - 1
        with self._on_stream():
            kept = length - (length - 1) // model.patch_sizes[0] * model.patch_sizes[0]
            cache.window, cache.length = bound.history[:, :kept].clone(), length
            for n, stage in enumerate(cache.stages):
                size = model.patch_sizes[n]
                seen = length + (self.is_ahead and n < last)
                if n > 0:
                    span = size * model.seq_lens[n]
                    stage.begin = (seen - 1) // span * span
                    stage.context = bound.contexts[n].clone()
                stage.position = (seen - stage.begin - (n < last)) // size
                stage.cache.position = 1 + stage.position
                is_over = n == last and self.is_begun
                stage.output = (bound.last_output if is_over else bound.outputs[n]).clone()

    def _next(self, left: int) -> _Unit:
        """The next unit, where a byte is pending and ``left`` bytes are wanted."""
        room = self.bound.slots
        if self.has_stages_above:
            position = self.length % self.patch_size
            if position == 0 and not self.is_begun:
                self._begin_patch()
            if position + 1 == self.patch_size and left > 1:
                whole = min(self.patch_size, room)
                level = self._level(self.length + 1)
                return _Unit(whole if left >= whole else 1, level)
            room = min(room, max(1, self.patch_size - 1 - position))
        return _Unit(room if room == self.bound.slots and left >= room else 1)

    def _begin_patch(self) -> None:
        """Bring the stages to where the first byte of a patch wants them."""
        with self._on_stream():
            if not self.is_ahead:
                self.bound.begin_patches(self._level(self.length) if self.length else -1)
            self.bound.begin_local_patch()
        self.is_ahead = self.is_begun = True

    def _level(self, length: int) -> int:
        """The most global stage that has a patch complete after so many bytes; -1 for none."""
        sizes = self.cache.model.patch_sizes[:-1]
        return next((n for n, size in enumerate(sizes) if length % size == 0), -1)

    def _play(self, unit: _Unit) -> _Queued:
        bound = self.bound
        numbers = None if self.ends is None else self._generator().get_state()
        self._draw(unit.count)
        bound.play(unit, self.graphs)
        ids = bound.ids[: unit.count]
        event = None
        if bound._is_cuda:
            host = torch.empty(ids.shape, dtype=ids.dtype, device="cpu", pin_memory=True)
            host.copy_(ids, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = ids.clone()
        queued = _Queued(unit, self.length, host, event, numbers)
        if unit.takes:
            self.length += unit.count
            at_end = self.length % self.patch_size == 0
            self.is_ahead = self.is_begun = unit.level is not None and at_end
        return queued

    def _draw(self, count: int) -> None:
        """Random numbers of so many bytes, as SPEC draws them: a byte's at a time."""
        for numbers in self.bound.uniform[:count]:
            numbers.uniform_(0, 1, generator=self.sampler.generator)

    def _generator(self) -> torch.Generator:
        if self.sampler.generator is not None:
            return self.sampler.generator
        if not self.bound._is_cuda:
            return torch.default_generator
        index = self.bound.device.index
        return torch.cuda.default_generators[
            torch.cuda.current_device() if index is None else index
        ]

    def _count_until_end(self, ids: torch.Tensor) -> int | None:
        """How many of ``ids (count, B)`` come before the end, its byte included; None if none."""
        if self.ends is None:
            return None
        for n, row in enumerate(ids):
            if self.ends[row].any():
                return n + 1
        return None

    def _go_back(self, done: _Queued, valid: int, left: int, queued: deque[_Queued]) -> int:
        """Forget what was queued after a byte that ended; returns the bytes that are left."""
        left += done.unit.count - valid + sum(later.unit.count for later in queued)
        queued.clear()
        with self._on_stream():
            self.bound.flags.zero_()
            assert done.numbers is not None
            self._generator().set_state(done.numbers)
            self._draw(valid)
        self.length = done.length + (valid if done.unit.takes else 0)
        at_end = self.has_stages_above and self.length % self.patch_size == 0
        # A turn whose first byte ended: the stages above went on beside it, the local one did not.
        self.is_ahead = at_end and done.unit.level is not None and done.unit.takes
        self.is_begun = False
        return left

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
