"""The units of a run on a GPU, and the buffers that they work on.

What is queued is made of the kernels of ``torch.classes.mblm.DeviceRun``:

- a *step* takes in the pending byte and samples the next;
- a *turn* is the step of a patch's last byte. The stages above take in the patch on another stream,
  beside it; then the local stage starts anew with its new context.

A turn and the steps of the rest of the patch are one unit; from its second time on it is one CUDA
graph. `device_run` decides which units are queued, and when.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mblm.inference.native_hierarchy import NativeHierarchy
from mblm.inference.sampling import Sampler
from mblm.ops.packing import NONE

if TYPE_CHECKING:
    from mblm.inference.hierarchy_cache import HierarchyCache

# Bytes of one unit, at most.
_SLOTS = 32


@dataclass(frozen=True)
class Unit:
    """What is queued at once: a turn, if ``level`` is given, and steps.

    Attributes:
        count: Bytes that it samples.
        level: Of a turn, the most global stage that takes in a patch.
        takes: Whether a byte is taken in before each is sampled.
    """

    count: int
    level: int | None = None
    takes: bool = True


class BoundRun:
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
        self.device = model.device
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
            context = NONE
            if n > 0:
                context = stage.output.new_zeros(batch, model.seq_lens[n], stage.output.shape[1])
            self.contexts.append(context)
            tensors += [self.positions[n], self.outputs[n], stage.start_output.contiguous()]
            tensors.append(context)
            tables = model.positions(n, 0, limits[n])
            tensors += [NONE if table is None else table.contiguous() for table in tables]
            if n > 0:
                state[n] = [*state[n], *stage.cache.native_start(stage.start_state)]
            tensors += state[n]
        # The local stage's output at the end of a patch, from which the next byte is sampled.
        self.last_output = torch.empty_like(self.outputs[-1])
        self._compiled = torch.ops.mblm.device_run(
            native.compiled, [t.detach() for t in tensors], [len(part) for part in state], limits
        )
        self.is_cuda = self.device.type == "cuda"
        self._beside = torch.cuda.Stream(self.device) if self.is_cuda else None
        self._graphs: dict[Unit, torch.cuda.CUDAGraph | None] = {}

    def load(self, cache: "HierarchyCache", sampler: Sampler, ends: torch.Tensor | None) -> None:
        """Take over a state and what is asked for."""
        kept = float(sampler.count_kept(self.model.num_tokens))
        top_p = sampler.top_p or 0.0
        if top_p:  # too small a number for a float keeps the likeliest, as 0 would not
            top_p = max(top_p, torch.finfo(torch.float32).tiny)
        self.settings.copy_(self.settings.new_tensor([sampler.temperature, top_p, kept]))
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

    def play(self, unit: Unit, graphs: bool) -> None:
        """Queue a unit; from the second time on, as a graph."""
        if not (graphs and self.is_cuda):
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

    def _queue(self, unit: Unit) -> None:
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
