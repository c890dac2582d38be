"""Rows of bytes and the stages of a model that take them in, in plain PyTorch.

A row's state is immutable: what takes in bytes gives another one. Rows that take in positions of a
stage at the same time are one call of the stage.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.cache import State
from mblm.inference.fingerprint import Seen
from mblm.inference.hosted import HostedStage, Share, embedded
from mblm.model.causal import CausalHierarchy
from mblm.model.stage import has_values, tensor_of
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy

# At most this many positions, and this many embedding values, are taken in at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22
# A row has at most so many bytes where nothing else limits it, as csrc/decode/torch/weights.h says.
_MOST_BYTES = 1 << 40


@dataclass(frozen=True, eq=False)
class StageState:
    """A stage of a row: its state, the last output ``(D_n,)`` and the context ``(P_n, D_n)``."""

    state: Share
    output: Tensor
    context: Tensor | None = None  # of the most global stage


class Tail:
    """The last bytes of a row, ``ids (n,)`` int64 on the CPU, which stay as they are.

    Others that come after them are written behind them, where nothing is yet, as after those of a
    copied row there may be: so one more takes no longer where there are many.
    """

    def __init__(
        self, ids: Tensor, memory: Tensor | None = None, ends: dict[int, bool] | None = None
    ) -> None:
        self.ids, self._memory = ids, ids if memory is None else memory
        self._ends = {len(ids): True} if ends is None else ends  # of what the memory holds, one

    def with_ids(self, ids: Tensor) -> "Tail":
        """With more at its end."""
        memory, ends, begin, end = self._memory, self._ends, len(self.ids), len(self.ids) + len(ids)
        # Of threads that come at once, one gets the end.
        if end > len(memory) or not ends.pop(begin, False):
            room = self.ids.new_empty(len(ids) + end // 4 + 64)
            memory, ends = torch.cat((self.ids, room)), {}
        memory[begin:end] = ids
        ends[end] = True
        return Tail(memory[:end], memory, ends)


@dataclass(frozen=True, eq=False)
class RowState:
    """A row: how many bytes it has and has taken in, the last of them, and its stages.

    ``tail`` are the bytes that are known: those from `schedule.tail_begin` on, which are still to
    be taken in, and before them what drafts are proposed from.
    """

    length: int
    taken: int
    tail: Tail
    stages: tuple[StageState, ...]

    def with_byte(self, token: int) -> "RowState":
        """With one more byte, which is pending."""
        tail = self.tail.with_ids(torch.tensor([token], device="cpu"))
        return RowState(self.length + 1, self.taken, tail, self.stages)


class _Work:
    """A row while its stages take in bytes up to ``end``, one stage after the other.

    ``begin`` is the byte that the sequence of the stage at work began at; ``position`` and ``goal``
    tell how many positions it has and will have taken in; ``trail``, if it is one, gets the local
    stage's outputs.
    """

    def __init__(self, row: RowState, ids: Tensor, trail: list[Tensor] | None) -> None:
        self.taken, self.end = row.taken, row.length + len(ids)
        self.stages, self.trail = list(row.stages), trail
        self.begin = self.position = self.goal = 0
        self._first = row.length - len(row.tail.ids)
        self._tail = row.tail.with_ids(ids) if len(ids) else row.tail

    def ids(self, count: int, patch_size: int) -> Tensor:
        """The bytes of the next positions of the stage at work, ``(count * patch_size,)``."""
        first = self.begin + self.position * patch_size - self._first
        return self._tail.ids[first : first + count * patch_size]

    def done(self) -> RowState:
        """The row when all stages have taken in their part."""
        return RowState(self.end, self.end, self._tail, tuple(self.stages))


class TorchStages:
    """The stages of a model as modules, with what lies between them."""

    def __init__(self, model: CausalHierarchy) -> None:
        self.model = model
        self._seen = [Seen(weight) for weight in model.parameters()]  # before it is computed with
        self._sizes = model.patch_sizes
        self._stages = [
            HostedStage(stage, model.start_token(n, 1))
            for n, stage in enumerate(model.stage_models)
        ]
        self._starts = tuple(
            StageState(stage.start, self._lasting(stage.start_output)[0]) for stage in self._stages
        )

    def are_current(self) -> bool:
        """Whether the model's weights are those that its stages were begun with."""
        weights = list(self.model.parameters())
        return len(weights) == len(self._seen) and all(map(Seen.is_still, self._seen, weights))

    def can_continue(self, other: "TorchStages") -> bool:
        """Whether these are the same stages as others, and rows of those go on with them."""
        return all(
            now.stage is then.stage
            and now.start_output.dtype == then.start_output.dtype
            and now.start_output.device == then.start_output.device
            for now, then in zip(self._stages, other._stages, strict=True)
        )

    def empty_row(self) -> RowState:
        """A row without bytes."""
        return RowState(0, 0, Tail(torch.empty(0, dtype=torch.long, device="cpu")), self._starts)

    def take_in(
        self,
        rows: Sequence[RowState],
        ids: Sequence[Tensor],
        trails: Iterable[list[Tensor] | None] = repeat(None),
    ) -> list[RowState]:
        """Rows after what is pending in them, and bytes ``(L,)`` on the CPU after it, maybe none.

        Memory beyond the rows' does not grow with the bytes, but for ``trails``: per row, what the
        outputs ``(S, D_N)`` of the local stage are appended to.
        """
        after, works = list(rows), {}
        for index, (row, new, trail) in enumerate(zip(rows, ids, trails, strict=False)):
            if row.length + len(new) > row.taken:
                works[index] = _Work(row, new, trail)
        for n in range(len(self._stages)):
            self._begin_patch([*works.values()], n)
            self._catch_up([*works.values()], n)
        for index, work in works.items():
            after[index] = work.done()
        return after

    def try_out(
        self, rows: Sequence[RowState], drafts: Sequence[Tensor]
    ) -> tuple[list[RowState], Tensor]:
        """`take_in` of drafts ``(n,)``, none of which may begin a patch.

        Also returns logits ``(sum of n + 1, V)``: row by row those of each byte of its draft and of
        the one after it.
        """
        trails = [[r.stages[-1].output[None]] if r.taken == r.length else [] for r in rows]
        after = self.take_in(rows, drafts, trails)
        logits = self.model.compute_logits(
            torch.cat([self._starts[-1].output[None][:0], *chain(*trails)])
        )
        begins = [0, *accumulate(len(draft) + 1 for draft in drafts)]
        if empty := [begin for row, begin in zip(rows, begins, strict=False) if row.length == 0]:
            logits[empty] = self.model.empty_logits(len(empty))[:, 0].to(logits)
        return after, logits

    def may_draft(self) -> bool:
        """Whether an output is the same beside others: 16 bits are rounded otherwise there."""
        is_cast = torch.is_autocast_enabled(self.model.device.type)
        return self.model.dtype.itemsize > 2 and not is_cast

    def _begin_patch(self, works: Sequence[_Work], n: int) -> None:
        """Begin stage n anew wherever the last byte is in another patch of the stage above."""
        anew = []
        for work in works:
            work.begin = schedule.begin(self._sizes, n, work.end)
            work.goal = schedule.position(self._sizes, n, work.end)
            work.position = schedule.position(self._sizes, n, work.taken)
            if work.taken == 0 or work.begin != schedule.begin(self._sizes, n, work.taken):
                work.position = 0
                work.stages[n] = self._starts[n]
                anew.append(work)
        if anew and n > 0:
            above = torch.stack([work.stages[n - 1].output for work in anew])
            contexts = self._lasting(self.model.project_context(n - 1, above[:, None]))
            for work, context in zip(anew, contexts, strict=True):
                start = self._starts[n]
                work.stages[n] = StageState(start.state, start.output, context)

    def _catch_up(self, works: Sequence[_Work], n: int) -> None:
        """Have stage n take in what it has not seen, side by side and in bounded pieces."""
        patch_size = self._sizes[n]
        while going := [work for work in works if work.position < work.goal]:
            values = len(going) * patch_size * self.model.hidden_dims[-1]
            chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
            count = min(chunk, *(work.goal - work.position for work in going))
            states = [work.stages[n] for work in going]
            x = embedded(
                self.model,
                n,
                torch.stack([work.ids(count, patch_size) for work in going]),
                [work.position for work in going],
                None if n == 0 else [state.context for state in states],  # type: ignore[misc]
            )
            y, after = self._stages[n].advance([state.state for state in states], x)
            y = self._lasting(y)
            last = zip(going, states, after, y[:, -1].clone(), y, strict=True)
            for work, before, state, output, outputs in last:
                work.stages[n] = StageState(state, output, before.context)
                work.position += count
                if work.trail is not None and n + 1 == len(self._stages):
                    work.trail.append(outputs)

    def _lasting(self, tensor: Tensor) -> Tensor:
        """In the model's own dtype: when what is kept is read, autocast may have ended."""
        if torch.is_autocast_enabled(tensor.device.type):
            return tensor.to(self.model.dtype)
        return tensor

    # -- What is saved -----------------------------------------------------------------------------

    def saved(self, row: RowState) -> State:
        """A row as `mblm.inference.cache.State` says."""
        state: State = {"length": row.length, "taken": row.taken, "tail": own_copy(row.tail.ids)}
        if row.taken == 0:
            return state
        for n, (stage, host) in enumerate(zip(row.stages, self._stages, strict=True)):
            state[f"{n}.output"] = own_copy(stage.output)
            if stage.context is not None:
                state[f"{n}.context"] = own_copy(stage.context)
            for name, value in host.saved(stage.state).items():
                state[f"{n}.{name}"] = value
        return state

    def loaded(self, state: State) -> RowState:
        """The row that was saved.

        Raises:
            ValueError: Something in the state does not fit the model or the rest of it.
        """
        length, taken, tail, parts = parts_of_state(state, self.model)
        stages = [self._loaded_stage(n, own, taken) for n, own in enumerate(parts)]
        return RowState(length, taken, Tail(tail), tuple(stages) or self._starts)

    def _loaded_stage(self, n: int, own: dict[str, Any], taken: int) -> StageState:
        shapes: dict[str, tuple[int, ...]] = {"output": (self.model.hidden_dims[n],)}
        if n > 0:
            shapes["context"] = self.model.seq_lens[n], self.model.hidden_dims[n]
        like = self._starts[n].output
        with names_stage(n):
            kept = {
                name: tensor_of(own, name, shape).detach().to(like, copy=True)
                for name, shape in shapes.items()
            }
            rest = {name: value for name, value in own.items() if name not in shapes}
            positions = 1 + schedule.position(self._sizes, n, taken)
            return StageState(self._stages[n].loaded(rest, positions), **kept)


@contextmanager
def names_stage(n: int) -> Iterator[None]:
    """Errors say which stage of a state does not fit."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"state: stage {n}: {error}") from error


def parts_of_state(
    state: Any, model: CausalHierarchy
) -> tuple[int, int, Tensor, list[dict[str, Any]]]:
    """Length, taken and tail, int64 on the CPU, of a state, and what each stage has, if any does.

    Raises:
        ValueError: It is no state, or these do not fit the model or one another.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"state: expected a dict by names, got {type(state).__name__}")
    given = dict(state)
    try:
        length, taken = (check_integer(name, given.pop(name, None)) for name in ("length", "taken"))
        tail = has_values("tail", given.pop("tail", None)).to("cpu", copy=True)  # nobody else's
        tail = check_token_ids("tail", tail, model.num_tokens).long()
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: {error}") from error
    limit = _MOST_BYTES if model.max_length is None else model.max_length
    if not 0 <= length <= limit:
        raise ValueError(f"state: length {length} exceeds the context of {limit} bytes")
    if taken not in (length, max(length - 1, 0)):
        raise ValueError(f"state: taken is {taken} with a length of {length}")
    begin, patch = schedule.tail_begin(model.patch_sizes, taken), model.patch_sizes[0]
    if tail.ndim != 1 or length - len(tail) not in range(0, begin + 1, patch):
        raise ValueError(
            f"state: tail must be ({length - begin},), or begin with another patch of {patch} "
            f"bytes before, got {tuple(tail.shape)} after {taken} bytes"
        )
    parts: list[dict[str, Any]] = [{} for _ in model.seq_lens] if taken else []
    for n, own in enumerate(parts):
        for key in [key for key in given if key.startswith(f"{n}.")]:
            own[key.removeprefix(f"{n}.")] = given.pop(key)
    if given:
        raise ValueError(f"state: expected no {', '.join(given)}")
    return length, taken, tail, parts
