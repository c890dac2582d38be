"""Rows of bytes and the stages of a model that take them in, in plain PyTorch.

A row's state is immutable: what takes in bytes gives another one. Rows that take in positions of a
stage at the same time are one call of the stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.cache import State
from mblm.inference.fingerprint import Seen
from mblm.inference.hosted import HostedStage, Share, joined, shares_of
from mblm.model.causal import CausalHierarchy
from mblm.model.stage import has_values, tensor_of
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy

# At most this many positions, and this many embedding values, are taken in at a time.
_CHUNK_POSITIONS = 1024
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, eq=False)
class StageState:
    """A stage of a row: its state, the last output ``(D_n,)`` and the context ``(P_n, D_n)``."""

    state: Share
    output: Share
    context: Share | None = None


@dataclass(frozen=True, eq=False)
class RowState:
    """A row: how many bytes it has and has taken in, the last of them, and its stages.

    Attributes:
        tail: The bytes from `schedule.tail_begin` on, and ``earlier`` what is known of those
            before, in pieces int32 ``(n,)`` that rows share.
    """

    length: int
    taken: int
    tail: tuple[int, ...]
    stages: tuple[StageState, ...]
    earlier: tuple[Tensor, ...] = ()

    def with_byte(self, token: int) -> "RowState":
        """With one more byte, which is pending."""
        tail = (*self.tail, token)
        return RowState(self.length + 1, self.taken, tail, self.stages, self.earlier)

    def known_from(self, index: int) -> Sequence[int]:
        """The bytes that are known, but for so many of the first."""
        index -= sum(map(len, self.earlier))
        return self.tail[index:] if index >= 0 else self.known()[index - len(self.tail) :].tolist()

    def known(self) -> Tensor:
        """The bytes that are known, ``(n,)`` int64."""
        tail = torch.tensor(self.tail, dtype=torch.long, device="cpu")
        return torch.cat((*self.earlier, tail)) if self.earlier else tail


class _Work:
    """A row while its stages take in bytes up to ``end``, one stage after the other.

    ``begin`` is the byte that the sequence of the stage at work began at; ``position`` and ``goal``
    tell how many positions it has and will have taken in.
    """

    def __init__(
        self, row: RowState, ids: Sequence[int] | Tensor, starts: Sequence[StageState]
    ) -> None:
        self.row, self.end = row, row.length + len(ids)
        self.stages = list(row.stages if row.taken else starts)
        self.outputs: list[Tensor] = []
        self.begin = self.position = self.goal = 0
        self._window_begin = row.length - len(row.tail)
        if isinstance(ids, Tensor):
            self._window: Any = torch.cat((ids.new_tensor(row.tail), ids))
        else:
            self._window = (*row.tail, *ids)

    def ids(self, count: int, patch_size: int) -> Tensor:
        """The bytes of the next positions of the stage at work, ``(count * patch_size,)``."""
        first = self.begin + self.position * patch_size - self._window_begin
        return torch.as_tensor(self._window[first : first + count * patch_size], device="cpu")

    def finish(self, tail_begin: int) -> None:
        """All stages have taken in their part."""
        cut = tail_begin - self._window_begin
        tail, earlier = self._window[cut:], self.row.earlier
        if cut:
            begin = torch.as_tensor(self._window[:cut], dtype=torch.int32, device="cpu").clone()
            while earlier and len(earlier[-1]) <= len(begin):  # few pieces, each copied seldom
                begin, earlier = torch.cat((earlier[-1], begin)), earlier[:-1]
            earlier = (*earlier, begin)
        tail = tuple(tail.tolist()) if isinstance(tail, Tensor) else tail
        self.row = RowState(self.end, self.end, tail, tuple(self.stages), earlier)


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
        self._starts = [
            StageState(stage.start, Share(self._lasting(stage.start_output)))
            for stage in self._stages
        ]

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
        return RowState(0, 0, (), tuple(self._starts))

    def take_in(
        self, rows: Sequence[RowState], ids: Sequence[Sequence[int] | Tensor]
    ) -> list[RowState]:
        """Rows after what is pending in them, and bytes ``(L,)`` on the CPU after it, maybe none.

        Memory beyond the rows' does not grow with the bytes.
        """
        return [work.row for work in self._advance(rows, ids)]

    def try_out(
        self, rows: Sequence[RowState], ids: Sequence[Sequence[int]]
    ) -> tuple[list[RowState], list[Tensor]]:
        """`take_in` with what the local stage gives after each byte, ``(bytes taken in, D_N)``."""
        works = self._advance(rows, ids, keep_outputs=True)
        return [work.row for work in works], [torch.cat(work.outputs) for work in works]

    def logits(self, rows: Sequence[RowState]) -> Tensor:
        """Logits of the next bytes of rows that have nothing pending, ``(rows, V)``."""
        if not rows:
            return self.model.empty_logits(1)[:0, 0]
        is_empty = [row.taken == 0 for row in rows]
        if all(is_empty):
            return self.model.empty_logits(len(rows))[:, 0]
        logits = self.logits_of([row.stages[-1].output for row in rows])
        if any(is_empty):
            logits[is_empty] = self.model.empty_logits(sum(is_empty))[:, 0]
        return logits

    def logits_of(self, outputs: Sequence[Share]) -> Tensor:
        """Logits of outputs ``(D_N,)`` of the local stage, ``(len(outputs), V)``."""
        return self.model.compute_logits(joined(outputs))

    def _advance(
        self,
        rows: Sequence[RowState],
        ids: Sequence[Sequence[int] | Tensor],
        keep_outputs: bool = False,
    ) -> list["_Work"]:
        works = [_Work(row, part, self._starts) for row, part in zip(rows, ids, strict=True)]
        going = [work for work in works if work.end > work.row.taken]
        last = len(self._stages) - 1
        for n in range(last + 1):
            self._begin_patch(going, n)
            self._catch_up(going, n, keep_outputs and n == last)
        for work in going:
            work.finish(schedule.tail_begin(self._sizes, work.end))
        return works

    def _begin_patch(self, works: Sequence["_Work"], n: int) -> None:
        """Begin stage n anew wherever the last byte is in another patch of the stage above."""
        anew = []
        for work in works:
            taken = work.row.taken
            begin = schedule.begin(self._sizes, n, work.end)
            if n > 0 and (taken == 0 or begin != schedule.begin(self._sizes, n, taken)):
                anew.append(work)
                work.position = 0
            else:
                work.position = schedule.position(self._sizes, n, taken)
            work.begin, work.goal = begin, schedule.position(self._sizes, n, work.end)
        if anew:
            above = joined([work.stages[n - 1].output for work in anew])
            start = self._starts[n]
            contexts = self._lasting(self.model.project_context(n - 1, above[:, None]))
            for work, context in zip(anew, shares_of(contexts, len(anew)), strict=True):
                work.stages[n] = StageState(start.state, start.output, context)

    def _catch_up(self, works: Sequence["_Work"], n: int, keep_outputs: bool) -> None:
        """Have stage n take in what it has not seen, side by side and in bounded pieces."""
        patch_size = self._sizes[n]
        while going := [work for work in works if work.position < work.goal]:
            values = len(going) * patch_size * self.model.hidden_dims[-1]
            chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // values))
            count = min(chunk, *(work.goal - work.position for work in going))
            x = self._embed(going, n, count)
            y, states = self._stages[n].advance([work.stages[n].state for work in going], x)
            y = self._lasting(y)
            last = y[:, -1] if count == 1 else y[:, -1].clone()
            outputs = shares_of(last, len(going))
            for row, (work, state) in enumerate(zip(going, states, strict=True)):
                work.stages[n] = StageState(state, outputs[row], work.stages[n].context)
                work.position += count
                if keep_outputs:
                    work.outputs.append(y[row])

    def _embed(self, works: Sequence["_Work"], n: int, count: int) -> Tensor:
        """The next positions of stage n, ``(rows, count, D_n)``."""
        ids = torch.stack([work.ids(count, self._sizes[n]) for work in works])
        x = self.model.embed_tokens(n, ids.to(self.model.device))
        firsts = [work.position for work in works]
        if len(set(firsts)) == 1:
            first = firsts[0]
            x = self.model.add_positions(n, x, first)
            return x if n == 0 else x + self._contexts(works, n)[:, first : first + count]
        begins = torch.tensor(firsts, device=x.device)
        x = self.model.add_positions(n, x, begins)
        if n == 0:
            return x
        positions = begins[:, None] + torch.arange(count, device=x.device)
        rows = torch.arange(len(works), device=x.device)[:, None]
        return x + self._contexts(works, n)[rows, positions]

    def _contexts(self, works: Sequence["_Work"], n: int) -> Tensor:
        shares = [work.stages[n].context for work in works]
        return joined(shares)  # type: ignore[arg-type]  # a stage below another has one

    def may_draft(self) -> bool:
        """Whether a byte is the same beside others: 16-bit numbers are rounded otherwise then."""
        is_cast = torch.is_autocast_enabled(self.model.device.type)
        return not is_cast and self.model.dtype.itemsize > 2

    def _lasting(self, tensor: Tensor) -> Tensor:
        """In the model's own dtype: when what is kept is read, autocast may have ended."""
        if torch.is_autocast_enabled(tensor.device.type):
            return tensor.to(self.model.dtype)
        return tensor

    # -- What is saved -----------------------------------------------------------------------------

    def saved(self, row: RowState) -> State:
        """A row as `mblm.inference.cache.State` says."""
        state: State = {
            "length": row.length,
            "taken": row.taken,
            "tail": row.known(),
        }
        if row.taken == 0:
            return state
        for n, (stage, host) in enumerate(zip(row.stages, self._stages, strict=True)):
            state[f"{n}.output"] = own_copy(joined([stage.output])[0])
            if stage.context is not None:
                state[f"{n}.context"] = own_copy(joined([stage.context])[0])
            for name, value in host.saved(stage.state).items():
                state[f"{n}.{name}"] = value
        return state

    def loaded(self, state: State) -> RowState:
        """The row that was saved.

        Raises:
            ValueError: Something in the state does not fit the model or the rest of it.
        """
        length, taken, tail, parts = parts_of_state(state, self.model)
        stages = tuple(self._starts)
        if parts:
            stages = tuple(self._loaded_stage(n, own, taken) for n, own in enumerate(parts))
        cut = schedule.tail_begin(self._sizes, taken) - (length - len(tail))
        earlier = (tail[:cut].int(),) if cut else ()
        return RowState(length, taken, tuple(tail[cut:].tolist()), stages, earlier)

    def _loaded_stage(self, n: int, own: dict[str, Any], taken: int) -> StageState:
        shapes: dict[str, tuple[int, ...]] = {"output": (self.model.hidden_dims[n],)}
        if n > 0:
            shapes["context"] = self.model.seq_lens[n], self.model.hidden_dims[n]
        positions = 1 + schedule.position(self._sizes, n, taken)
        like = self._starts[n].output.whole
        with names_stage(n):
            kept = [
                Share(tensor_of(own, name, shape).detach()[None].to(like, copy=True))
                for name, shape in shapes.items()
            ]
            rest = {name: value for name, value in own.items() if name not in shapes}
            return StageState(self._stages[n].loaded(rest, positions), *kept)


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
        length, taken = (check_integer(name, given.pop(name)) for name in ("length", "taken"))
        tail = has_values("tail", given.pop("tail"))
        tail = check_token_ids("tail", tail, model.num_tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state: {error}") from error
    limit = model.max_length
    if length < 0 or (limit is not None and length > limit):
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
    return length, taken, tail.cpu().long(), parts
