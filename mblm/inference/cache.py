"""The face of a decoding cache: rows that come and go, whichever engine keeps them.

A *row* is one sequence: its bytes, fed or chosen. The last of them may be *pending*: no stage has
taken it in yet, and what comes next does so first. What several rows are given is done for all or
for none; after an exception in `Cache.run`, each row is as after one of its bytes, and `Cache.last`
tells which were chosen.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from mblm.inference.plan import Plan

# A number that never comes to mean another row when it is dropped.
Row = int

# Why a run returned a row. The first that holds, in this order:
Reason = Literal[
    "stop",  # the stop automaton accepts; the byte that made it is kept
    "matched",  # the allow automaton accepts, and allows nothing more (with the bytes left)
    "length",  # max_tokens are chosen
    "context",  # the row is as long as the model's positions allow
    "memory",  # there is no room for more
    "logits",  # the plan pauses: the byte is the caller's to choose
    "time",  # go on by another run
    "error",  # a function of the caller's raised; a continuation says so, no cache does
]

# What a row's state is saved as. ``length`` and ``taken`` (bytes that the local stage has taken in,
# length or length - 1), ints; ``tail``, the last bytes, int64 (n,), at least those from
# `schedule.tail_begin` on. If taken > 0, per stage n: ``{n}.output (D_n,)``,
# ``{n}.context (P_n, D_n)`` if n > 0, and what the stage's `state_tensors` names, as
# ``{n}.keys``; or ``{n}.state``, a nest of tuples, lists and None with tensors as leaves.
# Positions follow from ``taken``.
State = dict[str, Any]


class Ran(NamedTuple):
    """What a run did with a row: tensors that are the caller's own.

    Attributes:
        ids: The bytes that it chose, ``(n,)`` int64 on the CPU.
        log_probs: Their log-probabilities, ``(n,)`` float32 on the CPU, where the plan asks.
        reason: Why the row returned.
    """

    ids: Tensor
    log_probs: Tensor | None
    reason: Reason


class ChangedModelError(RuntimeError):
    """A cache cannot go on with what a model has become; another one may, from the rows' states."""


class Cache(Protocol):
    """Decoding states of any number of rows of one model on one device.

    Every method that takes rows raises ValueError, and changes nothing, if a row was never added or
    is dropped, comes twice in the call, or is in another call at this time. Only `drop` does not.
    Lists and tensors of what belongs to rows are in the order of the rows.
    """

    def add(self, count: int = 1) -> list[Row]:
        """New rows without bytes."""
        ...

    def drop(self, rows: Sequence[Row]) -> None:
        """Forget rows. It never waits and never raises: rows that there are not are ignored."""
        ...

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        """New rows with the same bytes. What the rows have is shared; plans stay behind."""
        ...

    def feed(self, rows: Sequence[Row], ids: Sequence[bytes | Tensor]) -> None:
        """Append bytes to rows. Their plans go on as if nothing had been fed.

        Args:
            rows: The rows.
            ids: Per row its bytes, maybe none, below V: as such, or ``(L,)`` int64 on the CPU.

        Raises:
            ValueError: More bytes than the context.
        """
        ...

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> list[int]:
        """Give rows plans, in place of those they had; returns how many bytes rows have.

        Raises:
            ValueError: A plan does not fit the model or its device, has an ``allow`` that never
                accepts, or a lane that serves another row.
        """
        ...

    def run(
        self,
        rows: Sequence[Row],
        seconds: float = 0.02,
        drafts: Sequence[Tensor | None] | None = None,
    ) -> list[Ran]:
        """Continue rows as planned, side by side.

        It returns when the time is over, when no row can go on, or when one pauses: the end of a
        row does not stop the others. At least one row gets a byte if any can go on. A row that has
        ended returns without bytes and with the same reason.

        Args:
            rows: Rows with plans.
            seconds: How long, seen between bytes. Default 0.02.
            drafts: Per row, bytes that may come next, ``(n,)`` int64 on the CPU, or None. Those
                that the plan would choose anyway come sooner. No other byte is chosen for them,
                and no random number is drawn. They are not used where the plan pauses, where rows
                draw from one generator by turns, in 16-bit types, and by compiled code on a GPU.

        Raises:
            ValueError: A row has no plan, or a draft is not of token ids.
        """
        ...

    def last(self, rows: Sequence[Row]) -> list[Ran]:
        """What the last `run` or `choose` gave each row, again: an exception there loses no byte.

        Rows that have not run since their plan began get no ids. Where an exception comes before
        a run has begun, it is the run before that this tells of; `lengths` shows which.
        """
        ...

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the rows' next bytes, ``(rows, V)``: the caller's own."""
        ...

    def choose(
        self,
        rows: Sequence[Row],
        *,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Ran]:
        """Append one byte to rows whose plans pause and have not ended, by one of the three.

        Args:
            rows: The rows.
            ids: The bytes themselves, ``(rows,)`` int64. No numbers are drawn.
            logits: What the plan samples from, ``(rows, V)``, instead of the model's.
            mask: Where the plan may choose, ``(rows, V)`` bool.

        Raises:
            ValueError: Not exactly one of the three, another shape, an id that a plan's ``allow``
                forbids, or a row that is left nothing to choose from.
        """
        ...

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """How many bytes rows have."""
        ...

    def state(self, row: Row) -> State:
        """All that a row is, but for its plan: see `State`. The tensors are the caller's."""
        ...

    def state_so_far(self, row: Row) -> State:
        """`state` with what is pending left so: nothing is computed, whatever the model now is."""
        ...

    def set_state(self, row: Row, state: State) -> None:
        """Make a row what `state` gave, of this cache or another of the model; its plan ends.

        Raises:
            ValueError: Something in the state does not fit the model or the rest of it.
        """
        ...
