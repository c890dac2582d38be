"""The decoding cache in plain PyTorch: the reference, for every device, dtype and stage."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from mblm.inference import choosing, schedule
from mblm.inference.arguments import (
    MOST_ROWS,
    check_choice,
    check_count,
    check_drafts,
    check_fed,
    check_model,
    check_seconds,
)
from mblm.inference.cache import Cache, ChangedModelError, Ran, Reason, Row, State
from mblm.inference.choosing import Progress
from mblm.inference.plan import Draws, Lane, Plan, check_plan
from mblm.inference.torch_stages import RowState, TorchStages
from mblm.model.causal import CausalHierarchy
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy

_NO_IDS = torch.empty(0, dtype=torch.long, device="cpu")


@dataclass(frozen=True, eq=False)
class _Now:
    """All that a row is at a time. A slot changes by one assignment, so that nothing is torn."""

    bytes: RowState
    progress: Progress | None = None  # None without a plan


class _Slot:
    """A row, and the last call that it was in: it still is while that is locked."""

    def __init__(self, bytes: RowState) -> None:
        self.now = _Now(bytes)
        self.call = Lock()

    @property
    def progress(self) -> Progress:
        assert self.now.progress is not None  # checked where the call began
        return self.now.progress


class TorchCache(Cache):
    """A `Cache` whose rows are immutable values that each call replaces.

    Args:
        model: An `mblm.MBLM`. Weights that change are used from the next call on.

    Raises:
        ChangedModelError: By a call after a stage became another module, or its outputs another
            dtype or device.
    """

    @torch.inference_mode()
    def __init__(self, model: CausalHierarchy) -> None:
        self._model = model
        self._limit = math.inf if model.max_length is None else model.max_length
        self._stages = TorchStages(model)
        self._slots: dict[Row, _Slot] = {}
        self._next_rows = itertools.count()
        self._lock = Lock()  # while slots are taken for a call

    # -- Rows --------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[Row]:
        if check_integer("count", count, 0) > MOST_ROWS - len(self._slots):
            raise ValueError(f"count: expected at most {MOST_ROWS} rows, got {count}")
        return self._add([self._stages.empty_row()] * count)

    def _add(self, rows: Sequence[RowState]) -> list[Row]:
        slots = {next(self._next_rows): _Slot(row) for row in rows}
        self._slots.update(slots)
        return list(slots)

    def drop(self, rows: Sequence[Row]) -> None:
        for row in rows:
            slot = self._slots.pop(row, None) if type(row) is int else None
            if slot is not None:
                _leave(slot.now.progress)

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        with (call := Lock()):
            return self._add([slot.now.bytes for slot in self._take(rows, call)])

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        with (call := Lock()):
            return [slot.now.bytes.length for slot in self._take(rows, call)]

    @torch.inference_mode()
    def feed(self, rows: Sequence[Row], ids: Sequence[bytes | Tensor]) -> None:
        self._follow()
        with (call := Lock()):
            slots = self._take(rows, call)
            parts = check_fed(ids, rows, self._model.num_tokens)
            for slot, part in zip(slots, parts, strict=True):
                if len(part) > self._room(slot):
                    raise ValueError(
                        f"ids: {slot.now.bytes.length} bytes and {len(part)} more exceed the "
                        f"context of {self._limit} bytes, which fixed positions of stage 1 limit"
                    )
            given = [(s, part) for s, part in zip(slots, parts, strict=True) if len(part)]
            self._take_in([slot for slot, _ in given], [part for _, part in given])

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        self._follow()
        with (call := Lock()):
            slots = self._take(rows, call)
            nothing = [_NO_IDS] * len(slots)
            after, logits = self._stages.try_out([slot.now.bytes for slot in slots], nothing)
            _assign(slots, map(_Now, after, [slot.now.progress for slot in slots]))
            return own_copy(logits)

    @torch.inference_mode()
    def state(self, row: Row) -> State:
        self._follow()
        with (call := Lock()):
            (slot,) = self._take([row], call)
            self._take_in([slot])
            return self._stages.saved(slot.now.bytes)

    def state_so_far(self, row: Row) -> State:
        with (call := Lock()):
            (slot,) = self._take([row], call)
            return self._stages.saved(slot.now.bytes)

    @torch.inference_mode()
    def set_state(self, row: Row, state: State) -> None:
        self._follow()
        with (call := Lock()):
            (slot,) = self._take([row], call)
            loaded = self._stages.loaded(state)
            progress, slot.now = slot.now.progress, _Now(loaded)
            _leave(progress)

    def _take(self, rows: Sequence[Row], call: Lock) -> list[_Slot]:
        """Slots for one call at a time: as long as ``call`` is locked.

        A lock is released by no code of Python, in which a signal might come before.
        """
        with self._lock:
            taken: dict[_Slot, None] = {}
            for row in rows:
                slot = self._slots.get(row) if type(row) is int else None
                if slot is None:
                    raise ValueError(f"row {row!r}: there is no such row, or it was dropped")
                if slot in taken:
                    raise ValueError(f"row {row}: twice in one call")
                if slot.call.locked():
                    raise ValueError(f"row {row}: in another call at this time")
                taken[slot] = None
            for slot in taken:
                slot.call = call
            return list(taken)

    def _follow(self) -> None:
        """Go on with the weights that the model has now."""
        if self._stages.are_current():
            return
        check_model(self._model)
        stages = TorchStages(self._model)
        if not stages.can_continue(self._stages):
            raise ChangedModelError(
                "a stage is another one than when decoding began, or of another dtype or device; "
                "start a new session"
            )
        self._stages = stages

    def _take_in(self, slots: Sequence[_Slot], ids: Sequence[Tensor] | None = None) -> None:
        """Take in what is pending in rows, and bytes after it."""
        rows = [slot.now.bytes for slot in slots]
        after = self._stages.take_in(rows, [_NO_IDS] * len(slots) if ids is None else ids)
        _assign(slots, map(_Now, after, [slot.now.progress for slot in slots]))

    def _room(self, slot: _Slot) -> float:
        """How many bytes more a row may have."""
        return self._limit - slot.now.bytes.length

    # -- Plans -------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> list[int]:
        with (call := Lock()):
            slots = self._take(rows, call)
            check_count("plans", plans, rows)
            for index, plan in enumerate(plans):
                check_plan(f"plans[{index}]", plan, self._model.num_tokens, self._model.device)
            before = [slot.now.progress for slot in slots]
            entered: list[Lane] = []
            try:
                for progress, plan in zip(before, plans, strict=True):
                    entered.append(_enter(progress, plan))
            except BaseException:
                for lane in reversed(entered):
                    lane.put_back()
                raise
            begun = map(Progress.of, plans, entered)
            _assign(slots, map(_Now, [slot.now.bytes for slot in slots], begun))
            for progress in before:
                _leave(progress)
            return [slot.now.bytes.length for slot in slots]

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[Row],
        seconds: float = 0.02,
        drafts: Sequence[Tensor | None] | None = None,
    ) -> list[Ran]:
        end = time.monotonic() + check_seconds(seconds)
        self._follow()
        with (call := Lock()):
            slots = self._take_planned(rows, call)
            if drafts is not None:
                drafts = check_drafts(drafts, rows, self._model.num_tokens)
            self._restart(slots, drafts)
            may_draft = self._stages.may_draft() and _draw_apart(slots, self._model.device)
            with _giving_back(slots):
                while going := [slot for slot in slots if self._reason(slot) == "time"]:
                    self._step(self._ready(going), may_draft)
                    paused = any(self._reason(slot) == "logits" for slot in going)
                    if paused or time.monotonic() >= end:
                        break
            return self._returned(slots)

    def last(self, rows: Sequence[Row]) -> list[Ran]:
        with (call := Lock()):
            return self._returned(self._take_planned(rows, call))

    @torch.inference_mode()
    def choose(
        self,
        rows: Sequence[Row],
        *,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Ran]:
        check_choice(ids, logits, mask, (len(rows), self._model.num_tokens))
        if ids is not None:
            check_token_ids("ids", ids, self._model.num_tokens)
        self._follow()
        with (call := Lock()):
            slots = self._take_planned(rows, call)
            for row, slot in zip(rows, slots, strict=True):
                if not slot.progress.plan.pause:
                    raise ValueError(f"row {row}: its plan does not pause")
                if (reason := self._reason(slot)) not in ("time", "logits"):
                    raise ValueError(f"row {row}: its plan has ended ({reason})")
            if slots:
                self._restart(slots)
                with _giving_back(slots):
                    if ids is not None:
                        choose = partial(choosing.given, ids=ids)
                    else:
                        choose = partial(choosing.sampled, instead=logits, mask=mask)
                    self._append(slots, [_NO_IDS] * len(slots), choose)
            return self._returned(slots)

    def _take_planned(self, rows: Sequence[Row], call: Lock) -> list[_Slot]:
        slots = self._take(rows, call)
        for row, slot in zip(rows, slots, strict=True):
            if slot.now.progress is None:
                raise ValueError(f"row {row}: it has no plan")
        return slots

    def _reason(self, slot: _Slot) -> Reason:
        """Why a row's plan has ended, or how it goes on."""
        progress, row = slot.progress, slot.now.bytes
        pauses = progress.plan.pause and row.taken == row.length
        return progress.reason(self._room(slot)) or ("logits" if pauses else "time")

    def _restart(
        self, slots: Sequence[_Slot], drafts: Sequence[Tensor | None] | None = None
    ) -> None:
        """A run or a choice begins."""
        rows = [slot.now.bytes for slot in slots]
        begun = map(
            Progress.restarted, [slot.progress for slot in slots], drafts or itertools.repeat(None)
        )
        _assign(slots, map(_Now, rows, begun))

    def _returned(self, slots: Sequence[_Slot]) -> list[Ran]:
        reasons = [self._reason(slot) for slot in slots]
        for slot, reason in zip(slots, reasons, strict=True):
            if reason not in ("time", "logits"):
                _leave(slot.progress)
        return [slot.progress.ran(reason) for slot, reason in zip(slots, reasons, strict=True)]

    def _ready(self, slots: Sequence[_Slot]) -> Sequence[_Slot]:
        """All, but for those at the end of a patch where these had better wait for others."""
        sizes = self._model.patch_sizes
        if len(sizes) == 1:
            return slots
        rows = [slot.now.bytes for slot in slots]
        left = [-row.taken % sizes[-2] + (row.taken == row.length) for row in rows]
        if not schedule.pays_to_wait(sizes[-2], left):
            return slots
        return [slot for slot, steps in zip(slots, left, strict=True) if steps]

    def _draft(self, slot: _Slot) -> Tensor:
        """Bytes that may come in this patch."""
        row, progress = slot.now.bytes, slot.progress
        left = schedule.left_in_patch(self._model.patch_sizes, row.length)
        most = min(progress.plan.max_tokens - progress.count - 1, self._room(slot) - 1)
        return progress.drafted(row.tail.ids, int(most if left is None else min(most, left)))

    def _step(self, slots: Sequence[_Slot], may_draft: bool) -> None:
        """Take in what is pending, and choose a byte for each row that does not pause, or more."""
        drafts = [self._draft(slot) if may_draft else _NO_IDS for slot in slots]
        self._append(slots, drafts, partial(choosing.sampled_ahead, drafts=drafts))

    def _append(
        self,
        slots: Sequence[_Slot],
        drafts: Sequence[Tensor],
        choose: Callable[..., list[Progress]],
    ) -> None:
        """Take in what is pending, choose bytes, of which all but the last are of the drafts."""
        before, progress = [slot.now.bytes for slot in slots], [slot.progress for slot in slots]
        after, logits = self._stages.try_out(before, drafts)
        chosen = choose(progress, [self._room(slot) for slot in slots], logits)
        counts = [now.count - then.count for now, then in zip(chosen, progress, strict=True)]
        wrong = [i for i, draft in enumerate(drafts) if 0 < counts[i] <= len(draft)]
        right = [drafts[i][: counts[i] - 1] for i in wrong]
        again = self._stages.take_in([before[i] for i in wrong], right) if wrong else ()
        for i, row in zip(wrong, again, strict=True):
            after[i] = row
        for i, now in enumerate(chosen):
            if counts[i]:
                after[i] = after[i].with_byte(now.chosen[-1][0])
        _assign(slots, map(_Now, after, chosen))
        for now in chosen:
            now.lane.pass_on(now.drawn)


def _assign(slots: Sequence[_Slot], nows: Iterable[_Now]) -> None:
    """Change all rows in one call, so that a signal finds none of them changed or all."""
    deque(map(setattr, slots, itertools.repeat("now"), list(nows)), maxlen=0)


def _draw_apart(slots: Sequence[_Slot], device: torch.device) -> bool:
    """Whether no two rows draw by turns from one generator, in whose order a draft would meddle."""
    draws = {slot.progress.lane.draws for slot in slots}
    return len(draws) == len({of.generator_on(device) for of in draws})


@contextmanager
def _giving_back(slots: Sequence[_Slot]) -> Iterator[None]:
    """Give numbers back that were drawn for bytes that something raised has kept from coming."""
    try:
        yield
    except BaseException:
        for slot in reversed(slots):  # they draw in their order
            slot.progress.lane.pass_on(slot.progress.drawn)
            slot.progress.lane.draws.give_back()
        raise


def _enter(progress: Progress | None, plan: Plan) -> Lane:
    """The lane of a plan that takes the place of another."""
    draws = Draws() if plan.draws is None else plan.draws
    if progress is None:
        return draws.enter(plan.lane)
    progress.lane.pass_on(progress.drawn)
    return draws.enter(plan.lane, instead_of=progress.lane)


def _leave(progress: Progress | None) -> None:
    """A plan has ended, or another takes its place."""
    if progress is not None:
        progress.lane.leave(progress.drawn)
