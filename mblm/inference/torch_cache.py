"""The decoding cache in plain PyTorch: the reference, for every device, dtype and stage."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from threading import Lock

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.arguments import check_choice, check_count, check_seconds
from mblm.inference.cache import ChangedModelError, Ran, Reason, Row, State
from mblm.inference.choosing import given_bytes, sampled_bytes
from mblm.inference.hosted import Share
from mblm.inference.model import check_model
from mblm.inference.plan import Draws, Lane, Plan, check_plan, generator_of
from mblm.inference.progress import Progress
from mblm.inference.slots import Slots
from mblm.inference.torch_stages import RowState, TorchStages
from mblm.model.causal import CausalHierarchy
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.modes import own_copy

# Bytes of a draft that are taken in at a time, where no patch ends before.
_MAX_DRAFT = 64
# What is proposed must be right more often: where it is wrong, what was right is taken in again.
_PRICE = 0.6


@dataclass(frozen=True, eq=False)
class _Now:
    """All that a row is at a time. A slot changes by one assignment, so that nothing is torn."""

    bytes: RowState
    progress: Progress | None = None  # None without a plan


class _Slot:
    def __init__(self, now: _Now) -> None:
        self.now = now


class TorchCache:
    """A `mblm.inference.cache.Cache` whose rows are immutable values that each call replaces.

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
        self._stages = TorchStages(model)
        self._slots: Slots[_Slot] = Slots()

    # -- Rows --------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[Row]:
        """See `Cache.add`."""
        if check_integer("count", count) < 0:
            raise ValueError(f"count: expected a number >= 0, got {count}")
        empty = self._stages.empty_row()
        return self._slots.add([_Slot(_Now(empty)) for _ in range(count)])

    def drop(self, rows: Sequence[Row]) -> None:
        """See `Cache.drop`."""
        for slot in self._slots.drop(rows):
            _leave(slot.now.progress)

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        """See `Cache.copy`."""
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            return self._slots.add([_Slot(_Now(slot.now.bytes)) for slot in slots])

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """See `Cache.lengths`."""
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            return [slot.now.bytes.length for slot in slots]

    @torch.inference_mode()
    def feed(self, rows: Sequence[Row], ids: Sequence[bytes | Tensor]) -> None:
        """See `Cache.feed`."""
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            check_count("ids", ids, rows)
            for slot, part in zip(slots, ids, strict=True):
                room = self._room(slot.now.bytes)
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
        """See `Cache.logits`."""
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            self._take_in(slots)
            return own_copy(self._stages.logits([slot.now.bytes for slot in slots]))

    @torch.inference_mode()
    def state(self, row: Row) -> State:
        """See `Cache.state`."""
        self._follow()
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            self._take_in([slot])
            return self._stages.saved(slot.now.bytes)

    def state_so_far(self, row: Row) -> State:
        """See `Cache.state_so_far`."""
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            return self._stages.saved(slot.now.bytes)

    @torch.inference_mode()
    def set_state(self, row: Row, state: State) -> None:
        """See `Cache.set_state`."""
        self._follow()
        with (call := Lock()):
            (slot,) = self._slots.take([row], call)
            loaded = self._stages.loaded(state)
            progress, slot.now = slot.now.progress, _Now(loaded)
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
        self._stages = stages

    def _room(self, row: RowState) -> int | None:
        """How many bytes more a row may have; None if any number."""
        return None if self._max_length is None else self._max_length - row.length

    def _take_in(
        self, slots: Sequence[_Slot], ids: Sequence[Sequence[int] | Tensor] | None = None
    ) -> None:
        """Take in what is pending in rows, and bytes after it."""
        rows = [slot.now.bytes for slot in slots]
        after = self._stages.take_in(rows, [()] * len(slots) if ids is None else ids)
        _assign(slots, map(_Now, after, [slot.now.progress for slot in slots]))

    # -- Plans -------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> list[int]:
        """See `Cache.begin`."""
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
        """See `Cache.run`."""
        end = time.monotonic() + check_seconds(seconds)
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            plans = [self._progress(slot, row).plan for slot, row in zip(slots, rows, strict=True)]
            proposed = dict(zip(slots, self._check_drafts(plans, drafts), strict=True))
            proposing = _draw_apart(slots, self._model.device)
            for slot in slots:
                slot.now = _Now(slot.now.bytes, _planned(slot).restarted())
            with _giving_back(slots):
                while going := [slot for slot in slots if self._reason(slot) == "time"]:
                    self._step(self._ready(going), proposed, proposing)
                    paused = any(self._reason(slot) == "logits" for slot in going)
                    if paused or time.monotonic() >= end:
                        break
            return self._returned(slots)

    @torch.inference_mode()
    def last(self, rows: Sequence[Row]) -> list[Ran]:
        """See `Cache.last`."""
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
        """See `Cache.choose`."""
        check_choice(ids, logits, mask, (len(rows), self._model.num_tokens))
        self._follow()
        with (call := Lock()):
            slots = self._slots.take(rows, call)
            for slot, row in zip(slots, rows, strict=True):
                if not self._progress(slot, row).plan.pause:
                    raise ValueError(f"row {row}: its plan does not pause")
                if (reason := self._reason(slot)) not in ("time", "logits"):
                    raise ValueError(f"row {row}: its plan has ended ({reason})")
            if not slots:
                return []
            taken = self._stages.take_in([slot.now.bytes for slot in slots], [()] * len(slots))
            progress = [_planned(slot).restarted() for slot in slots]
            own = self._stages.logits(taken)
            rooms = [self._room(slot.now.bytes) for slot in slots]
            with _giving_back(slots):
                if ids is not None:
                    check_token_ids("ids", ids, self._model.num_tokens)
                    after = given_bytes(progress, rooms, own, ids)
                else:
                    after = sampled_bytes(progress, rooms, own, instead=logits, mask=mask)
                _commit(slots, taken, after)
            return self._returned(slots)

    def _progress(self, slot: _Slot, row: Row) -> Progress:
        if slot.now.progress is None:
            raise ValueError(f"row {row}: it has no plan")
        return slot.now.progress

    def _reason(self, slot: _Slot) -> Reason:
        """Why a row's plan has ended, or how it goes on."""
        progress, row = _planned(slot), slot.now.bytes
        pauses = progress.plan.pause and row.taken == row.length
        return progress.reason(self._room(row)) or ("logits" if pauses else "time")

    def _returned(self, slots: Sequence[_Slot]) -> list[Ran]:
        ran = []
        for slot in slots:
            reason = self._reason(slot)
            if reason not in ("time", "logits"):
                _leave(slot.now.progress)
            ran.append(_planned(slot).ran(reason))
        return ran

    def _ready(self, slots: Sequence[_Slot]) -> Sequence[_Slot]:
        """All, but for those at the end of a patch where these had better wait for others."""
        sizes = self._model.patch_sizes
        if len(sizes) == 1:
            return slots
        rows = [slot.now.bytes for slot in slots]
        left = [-r.taken % sizes[-2] + (r.taken == r.length) for r in rows]
        if not schedule.pays_to_wait(sizes[-2], left):
            return slots
        return [slot for slot, steps in zip(slots, left, strict=True) if steps]

    # -- Steps -------------------------------------------------------------------------------------

    def _step(
        self, slots: Sequence[_Slot], drafts: dict[_Slot, tuple[int, ...]], proposing: bool
    ) -> None:
        """Choose one byte for each row, or more where a draft says what may come."""
        counts = [_planned(slot).count for slot in slots]
        proposed = {slot: self._proposal(slot, drafts[slot], proposing) for slot in slots}
        if plain := [slot for slot in slots if not proposed[slot]]:
            self._step_plain(plain)
        if drafted := [slot for slot in slots if proposed[slot]]:
            self._step_drafted(drafted, [proposed[slot] for slot in drafted])
        for slot, count in zip(slots, counts, strict=True):
            chosen = _planned(slot).ids_from(count)
            draft = drafts[slot]
            is_right = draft[: len(chosen)] == chosen
            drafts[slot] = draft[len(chosen) :] if is_right else ()

    def _step_plain(self, slots: Sequence[_Slot]) -> None:
        """Take in what is pending, and choose one byte for each row that does not pause."""
        rows = self._stages.take_in([slot.now.bytes for slot in slots], [()] * len(slots))
        progress = [_planned(slot) for slot in slots]
        pausing = [i for i, now in enumerate(progress) if now.plan.pause]
        _assign([slots[i] for i in pausing], [_Now(rows[i], progress[i]) for i in pausing])
        going = [i for i, now in enumerate(progress) if not now.plan.pause]
        if going:
            rows = [rows[i] for i in going]
            rooms = [self._room(row) for row in rows]
            logits = self._stages.logits(rows)
            chosen = sampled_bytes([progress[i] for i in going], rooms, logits)
            _commit([slots[i] for i in going], rows, chosen)

    def _proposal(self, slot: _Slot, draft: tuple[int, ...], proposes: bool) -> tuple[int, ...]:
        """Of a draft, what the local stage can take in after what is pending."""
        row, progress = slot.now.bytes, _planned(slot)
        if row.length == 0:
            return ()
        left = schedule.left_in_patch(self._model.patch_sizes, row.length)
        most = min(_MAX_DRAFT if left is None else left, progress.left(self._room(row)) - 1)
        if not draft and proposes and (proposer := progress.proposer) is not None:
            come = row.known_from(proposer.known)
            for part in [come] if len(come) > 1 + _MAX_DRAFT else [[token] for token in come]:
                proposer.follow(part)
            return tuple(proposer.propose(min(most, progress.plan.draft), _PRICE))
        return draft[:most]

    def _step_drafted(self, slots: Sequence[_Slot], drafts: Sequence[tuple[int, ...]]) -> None:
        """Take in drafts at once, choose bytes as long as they are those, and take back the rest.

        The last byte that is chosen is pending, as ever.
        """
        before = [slot.now.bytes for slot in slots]
        rows, outputs = self._stages.try_out(before, drafts)
        # What each byte is predicted by: for the first, what is there unless a byte is pending.
        hidden = [
            output
            if row.taken < row.length
            else torch.cat((_row_of(row.stages[-1].output), output))
            for row, output in zip(before, outputs, strict=True)
        ]
        chosen = [_planned(slot) for slot in slots]
        accepted = [0] * len(slots)
        going = list(range(len(slots)))
        while going:
            at = [Share(hidden[i], accepted[i], len(hidden[i])) for i in going]
            rooms = [self._room_after(before[i], accepted[i]) for i in going]
            progress = [chosen[i] for i in going]
            sampled = sampled_bytes(progress, rooms, self._stages.logits_of(at))
            for i, after in zip(going, sampled, strict=True):
                chosen[i] = after
            going = [
                i for i in going if self._is_right(chosen[i], before[i], drafts[i], accepted[i])
            ]
            for i in going:
                accepted[i] += 1
        wrong = [i for i in range(len(slots)) if accepted[i] < len(drafts[i])]
        if wrong:
            kept = [drafts[i][: accepted[i]] for i in wrong]
            again = self._stages.take_in([before[i] for i in wrong], kept)
            for i, row in zip(wrong, again, strict=True):
                rows[i] = row
        _commit(slots, rows, chosen)

    def _is_right(
        self, progress: Progress, row: RowState, draft: tuple[int, ...], accepted: int
    ) -> bool:
        """Whether the byte chosen last is the draft's, and another comes after it."""
        return (
            accepted < len(draft)
            and progress.chosen[-1][0] == draft[accepted]
            and progress.reason(self._room_after(row, accepted + 1)) is None
        )

    def _room_after(self, row: RowState, count: int) -> int | None:
        room = self._room(row)
        return None if room is None else room - count

    def _check_drafts(
        self, plans: Sequence[Plan], drafts: Sequence[Tensor | None] | None
    ) -> list[tuple[int, ...]]:
        if drafts is None:
            return [()] * len(plans)
        check_count("drafts", drafts, plans)
        checked: list[tuple[int, ...]] = []
        for index, (plan, draft) in enumerate(zip(plans, drafts, strict=True)):
            if draft is None:
                checked.append(())
                continue
            name = f"drafts[{index}]"
            ids = check_token_ids(name, draft, self._model.num_tokens)
            if ids.ndim != 1:
                raise ValueError(f"{name}: expected shape (n,), got {tuple(ids.shape)}")
            if plan.pause:
                raise ValueError(f"{name}: the plan pauses, so that nothing is drafted")
            checked.append(tuple(ids.tolist()))
        return checked


def _assign(slots: Sequence[_Slot], nows: Iterable[_Now]) -> None:
    """Change all rows in one call, so that a signal finds none of them changed or all."""
    deque(map(setattr, slots, repeat("now"), list(nows)), maxlen=0)


def _commit(slots: Sequence[_Slot], rows: Sequence[RowState], chosen: Sequence[Progress]) -> None:
    """Append the bytes that were chosen last to rows that have taken in all before them."""
    appended = [row.with_byte(p.chosen[-1][0]) for row, p in zip(rows, chosen, strict=True)]
    _assign(slots, map(_Now, appended, chosen))
    for progress in chosen:
        progress.lane.pass_on(progress.drawn)


@contextmanager
def _giving_back(slots: Sequence[_Slot]) -> Iterator[None]:
    """Give numbers back that were drawn for bytes that something raised has kept from coming."""
    try:
        yield
    except BaseException:
        for slot in reversed(slots):  # they draw in their order
            progress = _planned(slot)
            progress.lane.pass_on(progress.drawn)
            progress.lane.draws.give_back()
        raise


def _draw_apart(slots: Sequence[_Slot], device: torch.device) -> bool:
    """Whether no two rows draw by turns from one generator."""
    draws = {_planned(slot).lane.draws for slot in slots}
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


def _planned(slot: _Slot) -> Progress:
    assert slot.now.progress is not None  # checked where the call began
    return slot.now.progress


def _row_of(share: Share) -> Tensor:
    """A row's share ``(D,)`` as ``(1, D)``."""
    row: Tensor = share.whole[share.index : share.index + 1]
    return row
