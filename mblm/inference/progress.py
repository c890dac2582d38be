"""A row's plan, as far as it has come."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mblm.inference.cache import Ran, Reason
from mblm.inference.draft import Proposer
from mblm.inference.plan import Lane, Plan


@dataclass(frozen=True, eq=False)
class Progress:
    """What has been chosen of a plan; replaced with every byte.

    Attributes:
        plan: The plan.
        lane: What it draws numbers from; ``drawn`` tells which of them come next.
        count: Bytes chosen.
        allow, stop: States of the automata.
        proposer: Proposes drafts, if there are to be any.
        first: How many were chosen before the last run, and ``chosen`` what since: the first
            ``count - first`` of the list, with their log-probabilities.
    """

    plan: Plan
    lane: Lane
    drawn: int
    count: int = 0
    allow: int = -1
    stop: int = -1
    first: int = 0
    chosen: list[tuple[int, float]] = field(default_factory=list)
    proposer: Proposer | None = None

    @classmethod
    def of(cls, plan: Plan, lane: Lane, before: "Progress | None" = None) -> "Progress":
        """The beginning of a plan, maybe after another of the row's."""
        allow, stop = (-1 if a is None else a.start for a in (plan.allow, plan.stop))
        proposer = None
        if plan.draft and not plan.pause:
            proposer = (before and before.proposer) or Proposer()
        return cls(plan, lane, lane.begin, allow=allow, stop=stop, proposer=proposer)

    def restarted(self) -> "Progress":
        """At the beginning of a run."""
        count = self.count
        return replace(self, first=count, chosen=[])

    def left(self, room: int | None) -> int:
        """Bytes that may still be chosen, in a row with room for so many (None: for any number)."""
        left = self.plan.max_tokens - self.count
        return left if room is None else min(left, room)

    def allowed(self, room: int | None) -> Tensor | None:
        """Where ``allow`` leaves a choice, ``(V,)`` bool."""
        automaton = self.plan.allow
        return None if automaton is None else automaton.allowed(self.allow, self.left(room))

    def reason(self, room: int | None) -> Reason | None:
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
        if allow is not None and not allow.allowed(self.allow, self.left(room)).any():
            return "matched"
        return None

    def with_byte(self, token: int, log_prob: float, *, drew: bool) -> "Progress":
        """After a byte that was sampled, or else given."""
        allow, stop, index = self.plan.allow, self.plan.stop, self.count - self.first
        # Nobody else has this list, and what comes after the bytes so far counts for nothing.
        self.chosen[index:] = [(token, log_prob)]
        return Progress(
            self.plan,
            self.lane,
            self.drawn + drew,
            self.count + 1,
            -1 if allow is None else allow.step(self.allow, token),
            -1 if stop is None else stop.step(self.stop, token),
            self.first,
            self.chosen,
            self.proposer,
        )

    def ids_from(self, count: int) -> tuple[int, ...]:
        """The bytes of this run that were chosen after so many."""
        chosen = self.chosen[count - self.first : self.count - self.first]
        return tuple(token for token, _ in chosen)

    def ran(self, reason: Reason) -> Ran:
        """What the last run gave."""
        chosen = self.chosen[: self.count - self.first]
        ids = [token for token, _ in chosen]
        given = [log_prob for _, log_prob in chosen] if self.plan.log_probs else None
        with torch.inference_mode(False):  # the caller's own
            return Ran(
                torch.tensor(ids, dtype=torch.long, device="cpu"),
                None if given is None else torch.tensor(given, dtype=torch.float32, device="cpu"),
                reason,
            )
