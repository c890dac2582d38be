"""Runs on a GPU: many bytes are sampled without the host, which reads them a patch later.

All state is on the GPU while bytes are sampled, positions and lengths included. What is queued is
made of the units of `device_units`. Two are queued at once, so that the GPU goes on while the host
reads.

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

from mblm.inference.device_units import BoundRun, Unit
from mblm.inference.native_hierarchy import NativeHierarchy
from mblm.inference.sampling import Sampler

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache

_QUEUED_UNITS = 2
_FIRST_LIMIT = 64


@dataclass
class _Queued:
    """A unit on its way.

    Attributes:
        length: Bytes taken in before it.
        ids: Its bytes ``(count, B)`` on the CPU, as soon as ``event`` has come.
        numbers: The generator's state before it, where that may be needed.
    """

    unit: Unit
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
        self._bound: BoundRun | None = None

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

    def _bind(self, cache: "HierarchyCache", num_tokens: int) -> BoundRun:
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
            self._bound = bound = BoundRun(self._native, cache, limits, state)
        return bound


class _Sampling:
    """One call of `DeviceRun.sample`.

    Attributes:
        length: Bytes taken in when all that is queued is done.
        is_ahead: Whether the stages above the local one are where the next byte wants them.
        is_begun: Whether the local stage is, too. Both are told apart only at a patch's end.
    """

    def __init__(
        self,
        bound: BoundRun,
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
        self._stream = torch.cuda.current_stream(bound.device) if bound.is_cuda else None
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
                unit = self._next(left) if has_pending else Unit(1, takes=False)
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

    def _next(self, left: int) -> Unit:
        """The next unit, where a byte is pending and ``left`` bytes are wanted."""
        room = self.bound.slots
        if self.has_stages_above:
            position = self.length % self.patch_size
            if position == 0 and not self.is_begun:
                self._begin_patch()
            if position + 1 == self.patch_size and left > 1:
                whole = min(self.patch_size, room)
                level = self._level(self.length + 1)
                return Unit(whole if left >= whole else 1, level)
            room = min(room, max(1, self.patch_size - 1 - position))
        return Unit(room if room == self.bound.slots and left >= room else 1)

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

    def _play(self, unit: Unit) -> _Queued:
        bound = self.bound
        numbers = None if self.ends is None else self._generator().get_state()
        self._draw(unit.count)
        bound.play(unit, self.graphs)
        ids = bound.ids[: unit.count]
        event = None
        if bound.is_cuda:
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
        if not self.bound.is_cuda:
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
