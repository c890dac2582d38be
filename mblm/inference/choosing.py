"""The next bytes of rows, each as its plan says, in plain PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from mblm.inference.cache import Ran, Reason
from mblm.inference.plan import MOST_DRAFTED, Lane, Plan
from mblm.inference.proposer import Proposer
from mblm.model.sampling import sample, sampling_dtype

# A byte is proposed if it is right, with all before it, in more than half of the cases: where it is
# wrong, a pass takes in again what was right.
_PRICE = 0.5


@dataclass(frozen=True, eq=False)
class Progress:
    """A row's plan, as far as it has come; replaced with every byte.

    Attributes:
        plan: The plan.
        lane: What it draws numbers from; ``drawn`` tells which of them come next.
        count: Bytes chosen.
        allow, stop: States of the automata.
        first: How many were chosen before the last run, and ``chosen`` what since: the first
            ``count - first`` of the list, with their log-probabilities.
        draft: Bytes ``(n,)`` that may come in this run, if some were given.
        proposer: What proposes others, where the plan drafts.
    """

    plan: Plan
    lane: Lane
    drawn: int
    count: int = 0
    allow: int = -1
    stop: int = -1
    first: int = 0
    chosen: list[tuple[int, float]] = field(default_factory=list)
    draft: Tensor | None = None
    proposer: Proposer = field(default_factory=Proposer)

    @classmethod
    def of(cls, plan: Plan, lane: Lane) -> "Progress":
        """The beginning of a plan."""
        allow, stop = (-1 if a is None else a.start for a in (plan.allow, plan.stop))
        return cls(plan, lane, lane.begin, allow=allow, stop=stop)

    def restarted(self, draft: Tensor | None = None) -> "Progress":
        """At the beginning of a run."""
        return replace(self, first=self.count, chosen=[], draft=draft)

    def drafted(self, ids: Tensor, most: int) -> Tensor:
        """At most so many bytes that may come after a row's, of which ``ids (n,)`` are known.

        They are those of the run's draft as long as it was right, or else the proposer's.
        """
        most = 0 if self.plan.pause else min(most, MOST_DRAFTED)
        if self.draft is not None:
            run = self.count - self.first
            right, rest = self.draft[:run], self.draft[run : run + most]
            if len(rest) and torch.equal(right, ids[len(ids) - run :]):
                return rest
        if not self.plan.draft:
            return ids[:0]
        for end in range(max(self.proposer.known, len(ids) - MOST_DRAFTED), len(ids)):
            self.proposer.follow(ids[: end + 1])
        return self.proposer.propose(ids, min(most, self.plan.draft), _PRICE)

    def allowed(self, room: float) -> Tensor | None:
        """Where ``allow`` leaves a choice, ``(V,)`` bool, in a row with room for so many bytes."""
        if self.plan.allow is None:
            return None
        left = int(min(self.plan.max_tokens - self.count, room))
        return self.plan.allow.allowed(self.allow, left)

    def reason(self, room: float) -> Reason | None:
        """Why the plan has ended; None if it goes on."""
        allow, stop = self.plan.allow, self.plan.stop
        if stop is not None and self.count and stop.accepts(self.stop):
            return "stop"
        if allow is not None and allow.is_complete(self.allow):
            return "matched"
        if self.count >= self.plan.max_tokens:
            return "length"
        if room == 0:
            return "context"
        allowed = self.allowed(room)
        return None if allowed is None or allowed.any() else "matched"

    def with_byte(self, token: int, log_prob: float, drew: bool) -> "Progress":
        """After a byte that was sampled, or else given."""
        plan = self.plan
        # Nobody else has this list, and what comes after the bytes so far counts for nothing.
        self.chosen[self.count - self.first :] = [(token, log_prob)]
        allow = -1 if plan.allow is None else plan.allow.step(self.allow, token)
        stop = -1 if plan.stop is None else plan.stop.step(self.stop, token)
        count, drawn = self.count + 1, self.drawn + drew
        mine = self.first, self.chosen, self.draft, self.proposer
        return Progress(plan, self.lane, drawn, count, allow, stop, *mine)

    def ran(self, reason: Reason) -> Ran:
        """What the last run gave."""
        chosen = self.chosen[: self.count - self.first]
        log_probs = [log_prob for _, log_prob in chosen] if self.plan.log_probs else None
        with torch.inference_mode(False):  # the caller's own
            return Ran(
                torch.tensor([token for token, _ in chosen], dtype=torch.long, device="cpu"),
                None if log_probs is None else torch.tensor(log_probs, device="cpu").float(),
                reason,
            )


def sampled(
    progress: Sequence[Progress],
    rooms: Sequence[float],
    own: Tensor,
    instead: Tensor | None = None,
    mask: Tensor | None = None,
) -> list[Progress]:
    """Plans with a byte each that is sampled from the model's ``own`` logits ``(rows, V)``.

    ``rooms`` tells how many bytes more each may have; ``instead`` are other logits to sample from;
    ``mask (rows, V)`` allows bytes.
    """
    logits = own if instead is None else instead.to(own)
    logits = logits.to(sampling_dtype(logits.dtype))
    allowed = [now.allowed(room) for now, room in zip(progress, rooms, strict=True)]
    may_come = None
    if any(row is not None for row in allowed):
        everything = torch.ones(logits.shape[1], dtype=torch.bool, device="cpu")
        may_come = torch.stack([everything if row is None else row for row in allowed])
        may_come = may_come.to(own.device)
        logits = logits.masked_fill(~may_come, -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask.to(own.device), -math.inf)
    is_nothing = (logits == -math.inf).all(-1)
    if (instead is not None or mask is not None) and is_nothing.any():
        row = is_nothing.tolist().index(True)
        raise ValueError(f"rows[{row}]: nothing is left to choose from")
    numbers = torch.stack([now.lane.numbers(now.drawn, logits) for now in progress])
    ids = torch.empty(len(progress), dtype=torch.long, device=own.device)
    alike: dict[tuple[float, int, float, float], list[int]] = {}
    for index, now in enumerate(progress):
        alike.setdefault(now.plan.filters, []).append(index)
    for filters, rows in alike.items():
        ids[rows] = sample(logits[rows], numbers[rows], *filters)
    if may_come is not None:  # of logits that are all -inf, the first that is allowed
        ids = torch.where(is_nothing, may_come.int().argmax(-1), ids)
    return _with_bytes(progress, ids, own, drew=True)


def sampled_ahead(
    progress: Sequence[Progress],
    rooms: Sequence[float],
    own: Tensor,
    drafts: Sequence[Tensor],
) -> list[Progress]:
    """`sampled` where plans do not pause, and again as long as what came is what a draft has.

    ``own (sum of n + 1, V)`` are, row by row, logits of each byte of its draft ``(n,)`` and of the
    one after it.
    """
    begins = [0, *accumulate(len(draft) + 1 for draft in drafts)]
    after, n = list(progress), 0
    going = [i for i, now in enumerate(progress) if not now.plan.pause]
    while going:
        at = [begins[i] + n for i in going]
        logits = own if len(at) == len(own) else own[at]
        chosen = sampled([after[i] for i in going], [rooms[i] - n for i in going], logits)
        for i, now in zip(going, chosen, strict=True):
            after[i] = now
        going = [
            i
            for i in going
            if n < len(drafts[i])
            and after[i].chosen[-1][0] == drafts[i][n]
            and after[i].reason(rooms[i] - n - 1) is None
        ]
        n += 1
    return after


def given(
    progress: Sequence[Progress], rooms: Sequence[float], own: Tensor, ids: Tensor
) -> list[Progress]:
    """Plans with bytes ``(rows,)`` that the caller chose; as `sampled`."""
    for index, (now, room, token) in enumerate(zip(progress, rooms, ids.tolist(), strict=True)):
        allowed = now.allowed(room)
        if allowed is not None and not allowed[token]:
            raise ValueError(f"ids[{index}]: the plan does not allow {token} here")
    return _with_bytes(progress, ids.to(own.device, torch.long), own, drew=False)


def _with_bytes(
    progress: Sequence[Progress], ids: Tensor, own: Tensor, drew: bool
) -> list[Progress]:
    log_probs = [0.0] * len(progress)
    if any(now.plan.log_probs for now in progress):
        log_probs = own.float().log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
    return [
        now.with_byte(token, log_prob, drew)
        for now, token, log_prob in zip(progress, ids.tolist(), log_probs, strict=True)
    ]
