"""How rows of the reference go on: a byte at a time, or as many as a draft has right."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.cache import Reason
from mblm.inference.choosing import sampled_bytes
from mblm.inference.hosted import Share
from mblm.inference.progress import Progress
from mblm.inference.torch_stages import RowState, TorchStages

# Bytes of a draft that are taken in at a time, where no patch ends before.
_MAX_DRAFT = 64
# What is proposed must be right more often: where it is wrong, what was right is taken in again.
_PRICE = 0.6


@dataclass(frozen=True, eq=False)
class Now:
    """All that a row is at a time. A slot changes by one assignment, so that nothing is torn."""

    bytes: RowState
    progress: Progress | None = None  # None without a plan


class Slot:
    def __init__(self, now: Now) -> None:
        self.now = now


class Steps:
    """What makes rows go on that have plans, by the stages that there are now."""

    def __init__(self, stages: TorchStages) -> None:
        self._stages = stages
        self._sizes, self._max_length = stages.model.patch_sizes, stages.model.max_length

    def room(self, row: RowState) -> int | None:
        """How many bytes more a row may have; None if any number."""
        return None if self._max_length is None else self._max_length - row.length

    def reason(self, slot: Slot) -> Reason:
        """Why a row's plan has ended, or how it goes on."""
        progress, row = planned(slot), slot.now.bytes
        pauses = progress.plan.pause and row.taken == row.length
        return progress.reason(self.room(row)) or ("logits" if pauses else "time")

    def ready(self, slots: Sequence[Slot]) -> Sequence[Slot]:
        """All, but for those at the end of a patch where these had better wait for others."""
        sizes = self._sizes
        if len(sizes) == 1:
            return slots
        rows = [slot.now.bytes for slot in slots]
        left = [-r.taken % sizes[-2] + (r.taken == r.length) for r in rows]
        if not schedule.pays_to_wait(sizes[-2], left):
            return slots
        return [slot for slot, steps in zip(slots, left, strict=True) if steps]

    def step(
        self, slots: Sequence[Slot], drafts: dict[Slot, tuple[int, ...]], proposing: bool
    ) -> None:
        """Choose one byte for each row, or more where a draft says what may come."""
        counts = [planned(slot).count for slot in slots]
        proposed = {slot: self._proposal(slot, drafts[slot], proposing) for slot in slots}
        if plain := [slot for slot in slots if not proposed[slot]]:
            self._step_plain(plain)
        if drafted := [slot for slot in slots if proposed[slot]]:
            self._step_drafted(drafted, [proposed[slot] for slot in drafted])
        for slot, count in zip(slots, counts, strict=True):
            chosen = planned(slot).ids_from(count)
            draft = drafts[slot]
            is_right = draft[: len(chosen)] == chosen
            drafts[slot] = draft[len(chosen) :] if is_right else ()

    def _step_plain(self, slots: Sequence[Slot]) -> None:
        """Take in what is pending, and choose one byte for each row that does not pause."""
        rows = self._stages.take_in([slot.now.bytes for slot in slots], [()] * len(slots))
        progress = [planned(slot) for slot in slots]
        pausing = [i for i, now in enumerate(progress) if now.plan.pause]
        assign([slots[i] for i in pausing], [Now(rows[i], progress[i]) for i in pausing])
        going = [i for i, now in enumerate(progress) if not now.plan.pause]
        if going:
            rows = [rows[i] for i in going]
            rooms = [self.room(row) for row in rows]
            logits = self._stages.logits(rows)
            chosen = sampled_bytes([progress[i] for i in going], rooms, logits)
            commit([slots[i] for i in going], rows, chosen)

    def _proposal(self, slot: Slot, draft: tuple[int, ...], proposes: bool) -> tuple[int, ...]:
        """Of a draft, what the local stage can take in after what is pending."""
        row, progress = slot.now.bytes, planned(slot)
        if row.length == 0 or not self._stages.may_draft():
            return ()
        left = schedule.left_in_patch(self._sizes, row.length)
        most = min(_MAX_DRAFT if left is None else left, progress.left(self.room(row)) - 1)
        if not draft and proposes and (proposer := progress.proposer) is not None:
            come = row.known_from(proposer.known)
            for part in [come] if len(come) > 1 + _MAX_DRAFT else [[token] for token in come]:
                proposer.follow(part)
            return tuple(proposer.propose(min(most, progress.plan.draft), _PRICE))
        return draft[:most]

    def _step_drafted(self, slots: Sequence[Slot], drafts: Sequence[tuple[int, ...]]) -> None:
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
        chosen = [planned(slot) for slot in slots]
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
        commit(slots, rows, chosen)

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
        room = self.room(row)
        return None if room is None else room - count


def assign(slots: Sequence[Slot], nows: Iterable[Now]) -> None:
    """Change all rows in one call, so that a signal finds none of them changed or all."""
    deque(map(setattr, slots, repeat("now"), list(nows)), maxlen=0)


def commit(slots: Sequence[Slot], rows: Sequence[RowState], chosen: Sequence[Progress]) -> None:
    """Append the bytes that were chosen last to rows that have taken in all before them."""
    appended = [row.with_byte(p.chosen[-1][0]) for row, p in zip(rows, chosen, strict=True)]
    assign(slots, map(Now, appended, chosen))
    for progress in chosen:
        progress.lane.pass_on(progress.drawn)


def planned(slot: Slot) -> Progress:
    assert slot.now.progress is not None  # checked where the call began
    return slot.now.progress


def _row_of(share: Share) -> Tensor:
    """A row's share ``(D,)`` as ``(1, D)``."""
    row: Tensor = share.whole[share.index : share.index + 1]
    return row
