"""The decoding cache in plain PyTorch: the reference, for every device, dtype and stage."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from mblm.inference.arguments import (
    check_choice,
    check_count,
    check_drafts,
    check_model,
    check_seconds,
)
from mblm.inference.cache import Cache, ChangedModelError, Ran, Row, State
from mblm.inference.choosing import given_bytes, sampled_bytes
from mblm.inference.plan import Draws, Lane, Plan, check_plan, generator_of
from mblm.inference.progress import Progress
from mblm.inference.slots import Slots
from mblm.inference.torch_stages import TorchStages
from mblm.inference.torch_steps import Now, Slot, Steps, assign, commit, planned
from mblm.model.causal import CausalHierarchy
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy


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
        self._max_length = model.max_length
        self._set_stages(TorchStages(model))
        self._slots: Slots[Slot] = Slots()

    def _set_stages(self, stages: TorchStages) -> None:
        self._stages, self._steps = stages, Steps(stages)

    # -- Rows --------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[Row]:
        if check_integer("count", count) < 0:
            raise ValueError(f"count: expected a number >= 0, got {count}")
        empty = self._stages.empty_row()
        return self._slots.add([Slot(Now(empty)) for _ in range(count)])

    def drop(self, rows: Sequence[Row]) -> None:
        for slot in self._slots.drop(rows):
            _leave(slot.now.progress)

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            return self._slots.add([Slot(Now(slot.now.bytes)) for slot in slots])

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            return [slot.now.bytes.length for slot in slots]

    @torch.inference_mode()
    def feed(self, rows: Sequence[Row], ids: Sequence[bytes | Tensor]) -> None:
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            check_count("ids", ids, rows)
            for slot, part in zip(slots, ids, strict=True):
                room = self._steps.room(slot.now.bytes)
                if room is not None and len(part) > room:
                    raise ValueError(
                        f"ids: {slot.now.bytes.length} bytes and {len(part)} more exceed the "
                        f"context of {self._max_length} bytes, which fixed positions of "
                        "stage 1 limit"
                    )
            fed = [(s, part) for s, part in zip(slots, ids, strict=True) if len(part)]
            self._take_in([slot for slot, _ in fed], [part for _, part in fed])

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Tensor:
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            self._take_in(slots)
            return own_copy(self._stages.logits([slot.now.bytes for slot in slots]))

    @torch.inference_mode()
    def state(self, row: Row) -> State:
        self._follow()
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            self._take_in([slot])
            return self._stages.saved(slot.now.bytes)

    def state_so_far(self, row: Row) -> State:
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            return self._stages.saved(slot.now.bytes)

    @torch.inference_mode()
    def set_state(self, row: Row, state: State) -> None:
        self._follow()
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            loaded = self._stages.loaded(state)
            progress, slot.now = slot.now.progress, Now(loaded)
            _leave(progress)

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
        self._set_stages(stages)

    def _take_in(
        self, slots: Sequence[Slot], ids: Sequence[Sequence[int] | Tensor] | None = None
    ) -> None:
        """Take in what is pending in rows, and bytes after it."""
        rows = [slot.now.bytes for slot in slots]
        after = self._stages.take_in(rows, [()] * len(slots) if ids is None else ids)
        assign(slots, map(Now, after, [slot.now.progress for slot in slots]))

    # -- Plans -------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> list[int]:
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            check_count("plans", plans, rows)
            for index, plan in enumerate(plans):
                check_plan(f"plans[{index}]", plan, self._model.num_tokens, self._model.device)
            entered: list[Lane] = []
            try:
                for slot, plan in zip(slots, plans, strict=True):
                    entered.append(_enter(slot.now.progress, plan))
            except BaseException:
                for lane in entered:
                    lane.leave(lane.begin)
                raise
            before = [slot.now.progress for slot in slots]
            begun = map(Progress.of, plans, entered, before)
            assign(slots, map(Now, [slot.now.bytes for slot in slots], begun))
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
            slots = self._slots.take(rows, call)
            for slot, row in zip(slots, rows, strict=True):
                self._progress(slot, row)
            proposed: dict[Slot, tuple[int, ...]] = dict.fromkeys(slots, ())
            given = [] if drafts is None else check_drafts(drafts, rows, self._model.num_tokens)
            for index, draft in enumerate(given):
                if draft is not None and planned(slots[index]).plan.pause:
                    raise ValueError(
                        f"drafts[{index}]: the plan pauses, so that nothing is drafted"
                    )
                proposed[slots[index]] = () if draft is None else tuple(draft.tolist())
            proposing = _draw_apart(slots, self._model.device)
            for slot in slots:
                slot.now = Now(slot.now.bytes, planned(slot).restarted())
            with _giving_back(slots):
                while going := [slot for slot in slots if self._steps.reason(slot) == "time"]:
                    self._steps.step(self._steps.ready(going), proposed, proposing)
                    paused = any(self._steps.reason(slot) == "logits" for slot in going)
                    if paused or time.monotonic() >= end:
                        break
            return self._returned(slots)

    @torch.inference_mode()
    def last(self, rows: Sequence[Row]) -> list[Ran]:
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            for slot, row in zip(slots, rows, strict=True):
                self._progress(slot, row)
            return self._returned(slots)

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
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            for slot, row in zip(slots, rows, strict=True):
                if not self._progress(slot, row).plan.pause:
                    raise ValueError(f"row {row}: its plan does not pause")
                if (reason := self._steps.reason(slot)) not in ("time", "logits"):
                    raise ValueError(f"row {row}: its plan has ended ({reason})")
            if not slots:
                return []
            taken = self._stages.take_in([slot.now.bytes for slot in slots], [()] * len(slots))
            progress = [planned(slot).restarted() for slot in slots]
            own = self._stages.logits(taken)
            rooms = [self._steps.room(slot.now.bytes) for slot in slots]
            with _giving_back(slots):
                if ids is not None:
                    check_token_ids("ids", ids, self._model.num_tokens)
                    after = given_bytes(progress, rooms, own, ids)
                else:
                    after = sampled_bytes(progress, rooms, own, instead=logits, mask=mask)
                commit(slots, taken, after)
            return self._returned(slots)

    def _progress(self, slot: Slot, row: Row) -> Progress:
        if slot.now.progress is None:
            raise ValueError(f"row {row}: it has no plan")
        return slot.now.progress

    def _returned(self, slots: Sequence[Slot]) -> list[Ran]:
        ran = []
        for slot in slots:
            reason = self._steps.reason(slot)
            if reason not in ("time", "logits"):
                _leave(slot.now.progress)
            ran.append(planned(slot).ran(reason))
        return ran


@contextmanager
def _giving_back(slots: Sequence[Slot]) -> Iterator[None]:
    """Give numbers back that were drawn for bytes that something raised has kept from coming."""
    try:
        yield
    except BaseException:
        for slot in reversed(slots):  # they draw in their order
            progress = planned(slot)
            progress.lane.pass_on(progress.drawn)
            progress.lane.draws.give_back()
        raise


def _draw_apart(slots: Sequence[Slot], device: torch.device) -> bool:
    """Whether no two rows draw by turns from one generator."""
    draws = {planned(slot).lane.draws for slot in slots}
    return len(draws) == len({generator_of(of, device) for of in draws})


def _enter(progress: Progress | None, plan: Plan) -> Lane:
    """The lane of a plan that takes the place of another."""
    draws = Draws() if plan.draws is None else plan.draws
    before = None
    if progress is not None and progress.lane.draws is draws:
        progress.lane.pass_on(progress.drawn)
        before = progress.lane
    return draws.enter(plan.lane, before)


def _leave(progress: Progress | None) -> None:
    """A plan has ended, or another takes its place."""
    if progress is not None:
        progress.lane.leave(progress.drawn)
