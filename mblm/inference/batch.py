"""Many prompts in one call: a row that ends makes room for the next prompt."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mblm.inference import schedule
from mblm.inference.cache import Cache, Row
from mblm.inference.continuation import Continuation, Course
from mblm.inference.engine import cache_for
from mblm.inference.generation import FinishReason, Generation, nothing_generated
from mblm.inference.prompt import Prompt, to_bytes
from mblm.inference.request import (
    Request,
    Wishes,
    check_names,
    lists_of,
    request,
    wishes_of,
)
from mblm.utils.checks import check_integer
from mblm.utils.naming import naming

OnBytes = Callable[[int, bytes], object]
OnResult = Callable[[int, Generation], object]

_SECONDS = 0.02  # of a run
_AT_FIRST = 64  # rows that a GPU has slots for, at most


def generate_batch(
    model: Any,
    prompts: Iterable[Prompt],
    *,
    max_rows: int = 64,
    seeds: Any = None,
    on_bytes: OnBytes | None = None,
    on_result: OnResult | None = None,
    weights: str = "float32",
    enable_progress: bool = True,
    **wishes: Any,
) -> list[Generation]:
    """Generate after each of many prompts; see `mblm.MBLM.generate_batch`."""
    check_names("generate_batch", wishes, Wishes.__optional_keys__ - {"seed", "generator"})
    max_rows = check_integer("max_rows", max_rows, 1)
    for name, function in (("on_bytes", on_bytes), ("on_result", on_result)):
        if not (function is None or callable(function)):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    is_one = isinstance(prompts, (str, bytes, bytearray, memoryview))
    if is_one or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 2) < 2:
        kind = type(prompts).__name__
        raise TypeError(f"prompts: expected a list of prompts, got {kind}; one is [prompt]")
    number = len(prompts) if isinstance(prompts, Sized) else None
    wishes = dict(seed=seeds, **wishes)
    try:
        with naming(seed="seeds"):
            lists = lists_of(wishes, number, "prompt")
            request(model, b"", **{n: wish for n, wish in wishes.items() if n not in lists})
        first_seed = int(torch.randint(2**62, (), device="cpu"))
        for one in _each(prompts, wishes, first_seed) if isinstance(prompts, (list, tuple)) else ():
            one.request(model)
        at_first = _AT_FIRST if number is None else min(number, _AT_FIRST)
        cache = cache_for(model, weights, max(min(max_rows, at_first), 1))
        bar = tqdm(total=number, unit=" prompts", leave=False, disable=not enable_progress)

        def note(index: int, result: Generation) -> None:
            bar.update()
            if on_result is not None:
                on_result(index, result)

        with bar:
            asked = _each(prompts, wishes, first_seed)
            return Batch(model, cache, asked, max_rows, on_bytes, note).run()
    except BaseException as error:
        if not hasattr(error, "generations"):  # it comes before anything has run
            error.generations = []  # type: ignore[attr-defined]
        raise


@dataclass(eq=False)
class _Asked:
    """A prompt that was read, and what is wished for it."""

    index: int
    prompt: Prompt
    wishes: dict[str, Any]
    count: int = 0  # ids that its row was given
    shown: int = 0  # ids that on_bytes was given, of an earlier row maybe

    def request(self, model: Any) -> Request:
        """Check it."""
        with naming(f"prompts[{self.index}]", prompt="", seed="seeds"):
            return request(model, self.prompt, **self.wishes)


def _each(
    prompts: Iterable[Prompt], wishes: Mapping[str, Any], first_seed: int
) -> Iterator[_Asked]:
    """Read prompts, one when it is asked for; the n-th of those without a seed has one n more."""
    for index, prompt in enumerate(prompts):
        with naming(seed="seeds"):
            own = wishes_of(wishes, index, "prompt")
        if own["seed"] is None:
            own["seed"] = first_seed + index
        yield _Asked(index, prompt, own)


class Batch:
    """Prompts that go on side by side in rows of a cache, each as if it were alone.

    They are read when a row is free. What goes wrong for one, such as a callback that raises, ends
    that one. Anything else ends all, as Ctrl-C does.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        prompts: Iterator[_Asked],
        max_rows: int,
        on_bytes: OnBytes | None,
        on_result: OnResult,
    ) -> None:
        self._model, self._cache, self._prompts = model, cache, prompts
        self._continuation = Continuation(cache, isolates=True)
        self._max_rows = self._limit = max_rows  # the limit is lower where memory is short
        self._on_bytes, self._on_result = on_bytes, on_result
        self._results: list[Generation | None] = []  # of all prompts that were read
        self._going: dict[Row, _Asked] = {}
        self._waiting: deque[_Asked] = deque()  # those that were read and have no row, in order
        self._patch = 1 if len(model.patch_sizes) == 1 else model.patch_sizes[-2]
        # Bytes that a row was given at most: by the last run, and since a prompt waits for it.
        self._run_bytes = self._waited = 0
        self._error: BaseException | None = None

    def run(self) -> list[Generation]:
        """What was generated after each prompt.

        Raises:
            BaseException: The first error. Its attribute ``generations`` is the list, for all
                prompts that were read, with what was chosen before it.
        """
        try:
            while self._admit():
                self._run_bytes = self._continuation.run(_SECONDS)
                self._note()
            if self._error is not None:
                raise self._error
        except BaseException as error:
            for row, asked in self._going.items():
                if self._results[asked.index] is None:
                    course = self._continuation[row]
                    result = course.result("error", asked.wishes["seed"], error)
                    self._results[asked.index] = result
            nothing = nothing_generated("error", None, error)
            error.generations = [result or nothing for result in self._results]  # type: ignore[attr-defined]
            raise
        return [result for result in self._results if result is not None]

    # -- Prompts -----------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fill free rows; returns whether any goes on."""
        while new := self._next_requests():
            rows, requests = self._cache.add(len(new)), [request for _, request in new]
            try:
                self._cache.feed(rows, [request.prompt for request in requests])
            except Exception as error:
                if not _is_of_memory(error):
                    raise
                self._cache.drop(rows)
                self._put_back([asked for asked, _ in new], error)
                continue
            self._continuation.add(rows, list(map(Course, requests)))
            self._going.update(zip(rows, [asked for asked, _ in new], strict=True))
            self._waited = 0
        return bool(self._going)

    def _next_requests(self) -> list[tuple[_Asked, Request]]:
        """The next prompts that may have rows."""
        found: list[tuple[_Asked, Request]] = []
        steps: float | None = None
        while len(self._going) + len(found) < self._limit and (asked := self._next()) is not None:
            steps = self._steps_to_come() if steps is None else steps
            try:
                checked = asked.request(self._model)
            except Exception as error:
                self._tell(asked, nothing_generated("error", asked.wishes["seed"], error))
                continue
            if self._steps(len(checked.prompt)) > steps:
                self._waiting.appendleft(asked)
                break
            found.append((asked, checked))
        return found

    def _steps_to_come(self) -> float:
        """So many bytes are chosen before all rows that go on are at the ends of their patches.

        A new row that is not there by then would have others wait, or wait itself. It had better
        begin later, together with others; but it waits no longer than a patch.
        """
        if not self._going or self._waited + self._run_bytes >= self._patch:
            return math.inf
        return max(map(self._steps, self._cache.lengths(list(self._going))))

    def _steps(self, length: int) -> int:
        """Bytes to be chosen before a row of this length is at the end of a patch."""
        return schedule.left_in_patch(self._model.patch_sizes, max(length - 1, 0)) or 0

    def _next(self) -> _Asked | None:
        if self._waiting:
            return self._waiting.popleft()
        try:
            asked = next(self._prompts, None)
        except Exception as error:  # nothing more is read; those that go on do so
            self._error = self._error or error
            return None
        self._results += [] if asked is None else [None]
        return asked

    # -- Rows --------------------------------------------------------------------------------------

    def _note(self) -> None:
        """Pass on what a run has given the rows, and let go of those that have ended."""
        lacking: list[Row] = []
        rows = list(self._going)
        for row in rows:
            course = self._continuation[row]
            error, reason = course.error, course.reason
            if self._on_bytes is not None:
                try:
                    self._show(self._going[row], course.fresh(), self._on_bytes)
                except Exception as raised:
                    error = raised
            if error is not None:
                self._end(row, "error", error)
            elif reason == "memory":
                lacking.append(row)
            elif reason != "time" and reason != "logits":
                self._end(row, reason)

        self._continuation.going += lacking  # they go on where others make room
        self._waited += self._run_bytes if self._waiting else 0
        if lacking and len(self._going) == len(rows):  # none has made room by ending
            error = MemoryError("no memory for the bytes to come")
            youngest = max(self._going, key=lambda row: self._going[row].index)
            if len(self._going) == 1:
                self._end(youngest, "memory", error)
            else:
                self._put_back([self._let_go(youngest)], error)

    def _show(self, asked: _Asked, ids: Tensor, on_bytes: OnBytes) -> None:
        """Give the callback the bytes that it has not had."""
        asked.count += len(ids)
        if asked.count <= asked.shown:
            return
        data = to_bytes(ids[asked.shown - asked.count :])
        asked.shown = asked.count
        if data:
            on_bytes(asked.index, data)

    def _end(self, row: Row, reason: FinishReason, error: Exception | None = None) -> None:
        asked = self._going[row]
        result = self._continuation[row].result(reason, asked.wishes["seed"], error)
        self._tell(asked, result)  # and keep it, before the row is gone
        self._let_go(row)
        self._limit = min(self._limit + 1, self._max_rows)

    def _let_go(self, row: Row) -> _Asked:
        asked = self._going.pop(row)
        self._continuation.remove(row)
        self._cache.drop([row])
        return asked

    def _put_back(self, asked: list[_Asked], error: Exception) -> None:
        """Have prompts wait until others are over, as there is no memory for so many rows.

        They begin anew then, and the same bytes will be chosen.
        """
        if len(asked) == 1 and not self._going:
            self._tell(asked[0], nothing_generated("memory", asked[0].wishes["seed"], error))
            return
        for one in reversed(asked):
            one.count = 0
            self._waiting.appendleft(one)
        self._limit = max(len(self._going), len(asked) // 2)

    def _tell(self, asked: _Asked, result: Generation) -> None:
        """Keep what has become of a prompt, and pass it on."""
        self._results[asked.index] = result
        self._error = self._error or result.error
        self._on_result(asked.index, result)


def _is_of_memory(error: Exception) -> bool:
    """PyTorch tells a lack of memory by a class of its own on a GPU, and on a CPU by its words."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)
