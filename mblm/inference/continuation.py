"""Rows that go on as requested, run by run: whatever is raised on the way, no byte is lost."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mblm.inference.cache import Cache, Ran, Reason, Row
from mblm.inference.drafter import Drafter
from mblm.inference.engine import cache_for
from mblm.inference.generation import FinishReason, Generation
from mblm.inference.guide import Guide
from mblm.inference.plan import Plan
from mblm.inference.request import LogitsProcessor, Request
from mblm.utils.checks import kind_of
from mblm.utils.modes import lasting_tensors

_NO_BYTES = torch.empty(0, dtype=torch.long, device="cpu")


class Course:
    """What has become of one request.

    Attributes:
        request: The request.
        begin: How many bytes its row had before, once it has one.
        ran: What each run gave the row.
        reason: Why the row came back from the last; it goes on as long as that is ``"time"``.
        error: What a function of the caller's raised, where the reason is ``"error"``.
        untold: The row's bytes that the drafter has not been told of.
    """

    reason: Reason = "time"
    error: Exception | None = None

    def __init__(self, request: Request) -> None:
        self.request, self.begin = request, 0
        self.ran: list[Ran] = []
        self._told = self._taken = 0  # of how many of these `fresh` has told, and `take` taken
        self.untold = self._so_far = request.prompt

    @cached_property
    def drafter(self) -> Drafter | None:
        """Another model that proposes bytes, if one does."""
        return self.request.drafter() if self.request.drafter else None

    @cached_property
    def _guide(self) -> Guide | None:
        guide = self.request.guide and self.request.guide()
        if self.request.guide and not hasattr(guide, "allowed"):
            raise TypeError(f"constraint: expected what makes a guide, it made {guide!r}")
        return guide

    def ids(self) -> Tensor:
        """The bytes chosen so far, ``(n,)`` int64 on the CPU: the caller's own."""
        if len(self.ran) == 1:
            return self.ran[0].ids
        return _joined([ran.ids for ran in self.ran], _NO_BYTES)

    def fresh(self) -> Tensor:
        """Those of them that it has not told yet; another thread may add more meanwhile."""
        told, self._told = self._told, len(self.ran)
        return _joined([ran.ids for ran in self.ran[told : self._told]], _NO_BYTES)

    def log_probs(self) -> Tensor | None:
        """Their log-probabilities, ``(n,)`` float32 on the CPU, where they are asked for."""
        if not self.request.plan.log_probs:
            return None
        given = [ran.log_probs for ran in self.ran if ran.log_probs is not None]
        return _joined(given, _NO_BYTES.float())

    def is_matched(self) -> bool | None:
        """Whether the constraint accepts the bytes so far; None without one."""
        if self._guide is not None:
            self.take()
            return self._guide.accepts()
        allow = self.request.plan.allow
        return None if allow is None else allow.accepts(allow.walk(self.ids()))

    def result(
        self, reason: FinishReason, seed: int | None, error: BaseException | None = None
    ) -> Generation:
        """What was generated; with the reason ``"error"`` where the guide fails when it is asked
        whether it accepts that."""
        with lasting_tensors():
            is_matched = None
            try:
                is_matched = self.is_matched()
            except Exception as raised:
                reason, error = "error", error or raised
            prompt, ids, log_probs = self.request.prompt.clone(), self.ids(), self.log_probs()
            return Generation(prompt, ids, reason, is_matched, log_probs, seed, error)

    def draft(self) -> Tensor | None:
        """Bytes that may come next, ``(n,)``."""
        if self.drafter is None:
            return None
        untold, self.untold = self.untold, _NO_BYTES
        return self.drafter.propose(untold)

    # -- The answer to a pause ---------------------------------------------------------------------

    def _mask(self, length: int) -> Tensor | None:
        """Where the guide leaves a choice, ``(V,)`` bool, at that length of the row, or None."""
        if self._guide is None:
            return None
        mask = self._guide.allowed(self.begin + self.request.plan.max_tokens - length)
        shape = (self.request.num_tokens,)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            raise TypeError(f"constraint: expected allowed to give bools {shape}, got {mask!r:.80}")
        if not mask.any() and not self._guide.accepts():
            raise ValueError("constraint: nothing may follow, and what there is does not match")
        return mask

    def answer(self, length: int, logits: Tensor) -> Tensor | None:
        """What the next byte of a row of that length is chosen by: its logits ``(V,)``, which are
        the processor's own, as that and the guide leave them. None where nothing may follow."""
        mask = self._mask(length)
        if mask is not None and not mask.any():
            return None
        if self.request.logits_processor is not None:
            logits = self._processed(self.request.logits_processor, logits)
        return logits if mask is None else logits.masked_fill(~mask.to(logits.device), -math.inf)

    def _processed(self, processor: LogitsProcessor, logits: Tensor) -> Tensor:
        result = processor(self._so_far.to(logits.device, copy=True), logits)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise TypeError(
                "logits_processor: expected it to return floating point logits, got "
                f"{kind_of(result)}"
            )
        if result.shape != logits.shape:
            raise ValueError(
                f"logits_processor: expected it to return logits {tuple(logits.shape)}, got "
                f"{tuple(result.shape)}"
            )
        result = result.detach().to(logits)
        if result.isnan().any():
            raise ValueError("logits_processor: it returned logits that are NaN")
        return result

    def take(self) -> None:
        """Have what answers go on by the bytes that were chosen, also in a run that was left."""
        taken, self._taken = self._taken, len(self.ran)
        ids = _joined([ran.ids for ran in self.ran[taken:]], _NO_BYTES)
        if self.request.logits_processor is not None:
            self._so_far = torch.cat((self._so_far, ids))
        if self._guide is not None:
            for token in ids.tolist():
                self._guide.take(token)

    def is_complete(self) -> bool:
        """Whether the guide ends the row here, where nothing else has that comes before."""
        return self.reason != "stop" and self._guide is not None and self._guide.is_complete()


def begun(model: Any, course: Course, weights: str) -> "Continuation":
    """A continuation of one row, in a cache of its own, that has taken in its prompt."""
    cache = cache_for(model, weights)
    rows = cache.add()
    cache.feed(rows, [course.request.prompt])
    continuation = Continuation(cache)
    continuation.add(rows, [course])
    return continuation


class Continuation:
    """Rows of one cache that go on side by side; they join and leave at any time.

    Where it ``isolates`` rows, an error of a row's own functions ends that row alone; otherwise it
    is raised. ``going`` are the rows that have not ended.
    """

    def __init__(self, cache: Cache, isolates: bool = False) -> None:
        self._cache, self._isolates = cache, isolates
        self._courses: dict[Row, Course] = {}
        self._stops = 0  # how many of the rows pause, or are to be told what may come
        self.going: list[Row] = []

    def add(self, rows: Sequence[Row], courses: Sequence[Course]) -> None:
        """Have rows go on that have taken in their prompts, each on a new course."""
        lengths = self._cache.begin(rows, [course.request.plan for course in courses])
        for row, course, length in zip(rows, courses, lengths, strict=True):
            self._courses[row], course.begin = course, length
            if course.drafter is not None and length > len(course.request.prompt):
                course.untold = self._cache.state_so_far(row)["tail"]
            self._stops += course.request.stops
        self.going += rows

    def remove(self, row: Row) -> None:
        """Forget a row, which the cache keeps."""
        self._stops -= self._courses.pop(row).request.stops
        if row in self.going:
            self.going.remove(row)

    def __getitem__(self, row: Row) -> Course:
        return self._courses[row]

    def run(self, seconds: float = 0.02) -> int:
        """Let all rows go on that have not ended; returns how many bytes one got, at most.

        A row goes on by another run as long as the reason is ``"time"``. Rows that pause are
        answered: by what their guide and their logits processor say. Whatever is raised, all that
        was chosen before is noted.

        Raises:
            MemoryError: There is no memory for the bytes to come, unless the rows are isolated.
        """
        try:
            if self._stops:
                return self._run_and_answer(seconds)
            rows = list(self.going)
            return self._note(rows, self._cache.run(rows, seconds))
        except BaseException:
            self._settle()
            raise

    def _note(self, rows: Sequence[Row], results: Sequence[Ran]) -> int:
        """Go on by what a run gave the rows; returns how many bytes, at most."""
        lacks_memory, most = False, 0
        for row, ran in zip(rows, results, strict=True):
            course = self._courses[row]
            course.ran.append(ran)
            course.reason = ran.reason
            if (count := ran.ids.numel()) > most:
                most = count
            if course.drafter is not None:
                course.untold = torch.cat((course.untold, ran.ids))
            if ran.reason not in ("time", "logits"):
                self.going.remove(row)
                lacks_memory |= ran.reason == "memory"
        if lacks_memory and not self._isolates:
            raise MemoryError("no memory for the bytes to come")
        return most

    def _settle(self) -> None:
        """Note what was chosen in a call that has raised, or whose results nobody saw."""
        lengths = self._cache.lengths(list(self._courses))
        for (row, course), length in zip(self._courses.items(), lengths, strict=True):
            if missed := length - course.begin - course.ids().numel():
                (last,) = self._cache.last([row])  # chosen before a run raised, or was noted
                log_probs = None if last.log_probs is None else last.log_probs[-missed:]
                course.ran.append(Ran(last.ids[-missed:], log_probs, last.reason))

    # -- Pauses ------------------------------------------------------------------------------------

    def _run_and_answer(self, seconds: float) -> int:
        """`run` of rows of which some pause or are drafted for, a byte or a draft at a time."""
        end, most = time.monotonic() + seconds, 0
        while going := list(self.going):
            if any(self._courses[row].drafter is not None for row in going):
                drafts = [self._courses[row].draft() for row in going]
                results = self._cache.run(going, 0.0, drafts)
            else:
                results = self._cache.run(going, max(0.0, end - time.monotonic()))
            most += self._note(going, results)
            if paused := [row for row in going if self._courses[row].reason == "logits"]:
                most += self._answer(paused)
            if time.monotonic() >= end:
                break
        return most

    def _answer(self, rows: Sequence[Row]) -> int:
        """Choose a byte for each of rows that pause; returns how many, at most."""
        answers: dict[Row, Tensor] = {}
        lengths, logits = self._cache.lengths(rows), self._cache.logits(rows)
        for index, row in enumerate(rows):
            with self._own_errors(row):
                answer = self._courses[row].answer(lengths[index], logits[index])
                if answer is None:
                    self._end(row, "matched")
                else:
                    answers[row] = answer
        return self._choose(answers)

    def _choose(self, answers: Mapping[Row, Tensor]) -> int:
        """Choose by logits: for each row by itself where one is left nothing to choose from."""
        if not answers:
            return 0
        rows = list(answers)
        try:
            results = self._cache.choose(rows, logits=torch.stack([*answers.values()]))
        except ValueError as error:
            if len(rows) > 1:
                return max(self._choose({row: answer}) for row, answer in answers.items())
            processes = self._courses[rows[0]].request.logits_processor is not None
            name = "logits_processor" if processes else "constraint"
            with self._own_errors(rows[0]):
                raise ValueError(f"{name}: it leaves nothing to choose from") from error
            return 0
        most = self._note(rows, results)
        for row in rows:
            with self._own_errors(row):
                self._courses[row].take()
                if self._courses[row].is_complete():
                    self._end(row, "matched")
        return most

    def _end(self, row: Row, reason: Reason) -> None:
        """End a row whose plan would go on, so that nothing waits for its numbers."""
        self._courses[row].reason = reason
        if row in self.going:
            self.going.remove(row)
        self._cache.begin([row], [Plan(0)])

    @contextmanager
    def _own_errors(self, row: Row) -> Iterator[None]:
        """What a row's own functions raise ends that row alone where that is asked for."""
        try:
            yield
        except Exception as error:
            if not self._isolates:
                raise
            self._courses[row].error = error
            self._end(row, "error")


def _joined(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    with torch.inference_mode(False):  # the caller's own, as each part is
        return torch.cat([empty, *parts])
