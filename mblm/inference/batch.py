"""Many prompts in one call: a row that ends makes room for the next prompt."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from mblm.inference.cache import Cache, Ran, Row
from mblm.inference.engine import cache_for
from mblm.inference.generation import FinishReason, Generation, generation_of
from mblm.inference.prompt import Prompt, to_bytes
from mblm.inference.request import Request
from mblm.inference.wishes import Wishes, request_of
from mblm.utils.checks import check_integer

OnBytes = Callable[[int, bytes], object]

_SECONDS = 0.02  # of a run


def generate_batch(
    model: Any,
    prompts: Iterable[Prompt],
    *,
    max_rows: int = 64,
    seeds: Any = None,
    on_bytes: OnBytes | None = None,
    weights: str = "float32",
    enable_progress: bool = True,
    **arguments: Any,
) -> list[Generation]:
    """Generate after each of many prompts; see `mblm.MBLM.generate_batch`."""
    if (max_rows := check_integer("max_rows", max_rows)) < 1:
        raise ValueError(f"max_rows: expected a number >= 1, got {max_rows}")
    if not (on_bytes is None or callable(on_bytes)):
        raise TypeError(f"on_bytes: expected a function, got {type(on_bytes).__name__}")
    wishes = Wishes(prompts, seeds, arguments)
    wishes.check(model)
    cache = cache_for(model, weights)
    bar = tqdm(total=wishes.number, unit=" prompts", leave=False, disable=not enable_progress)
    with bar:
        return Batch(model, cache, iter(wishes), max_rows, on_bytes, bar.update).run()


@dataclass(eq=False)
class _Asked:
    """A prompt that was read.

    Attributes:
        index: Which one it is.
        arguments: Of its request.
        shown: How many ids ``on_bytes`` was given.
    """

    index: int
    arguments: dict[str, Any]
    shown: int = 0


@dataclass(eq=False)
class _Going:
    """A prompt that has a row; ``parts`` is what its runs have given so far."""

    asked: _Asked
    request: Request
    row: Row
    parts: list[Ran] = field(default_factory=list)

    def count(self) -> int:
        """How many ids were chosen."""
        return sum(len(ran.ids) for ran in self.parts)


class Batch:
    """Prompts that go on side by side in rows of a cache, each as if it were alone.

    What goes wrong for one prompt, such as a callback that raises, ends that one. Anything else
    ends all, as Ctrl-C does.

    Args:
        model: The model.
        cache: Where the rows are.
        prompts: Arguments of requests, read when a row is free.
        max_rows: How many rows there are at most.
        on_bytes: Gets the index of a prompt and its next bytes.
        on_end: Called when a prompt is over.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        prompts: Iterator[dict[str, Any]],
        max_rows: int,
        on_bytes: OnBytes | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._model, self._cache, self._prompts = model, cache, prompts
        self._max_rows = self._limit = max_rows  # the limit is lower where memory is short
        self._on_bytes, self._on_end = on_bytes, on_end
        self._results: list[Generation | None] = []  # of all prompts that were read
        self._going: list[_Going] = []
        self._waiting: deque[_Asked] = deque()  # those that had to give up their rows, in order
        self._error: BaseException | None = None

    def run(self) -> list[Generation]:
        """What was generated after each prompt.

        Raises:
            BaseException: The first error. Its attribute ``generations`` is the list, for all
                prompts that were read, with what was chosen before it.
        """
        try:
            while self._admit():
                self._note(self._cache.run([going.row for going in self._going], _SECONDS))
            if self._error is not None:
                raise self._error
        except BaseException as error:
            for going in self._going:
                self._settle(going)
                self._keep(going.asked, going.request, going.parts, "error", error)
            for asked in self._waiting:
                self._keep(asked, None, [], "error", error)
            error.generations = self._generations()  # type: ignore[attr-defined]
            raise
        return self._generations()

    def _generations(self) -> list[Generation]:
        return [result for result in self._results if result is not None]

    # -- Prompts -----------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fill free rows; returns whether any goes on."""
        while new := self._requests(self._limit - len(self._going)):
            rows = self._cache.add(len(new))
            begun = [
                _Going(asked, request, row) for (asked, request), row in zip(new, rows, strict=True)
            ]
            self._going += begun
            try:
                self._cache.feed(rows, [going.request.prompt for going in begun])
                self._cache.begin(rows, [going.request.plan for going in begun])
            except MemoryError as error:
                self._give_way(begun, error)
        return bool(self._going)

    def _requests(self, most: int) -> list[tuple[_Asked, Request]]:
        """The next prompts, at most so many: those that gave up a row, then new ones."""
        requests: list[tuple[_Asked, Request]] = []
        while len(requests) < most and (asked := self._next()) is not None:
            try:
                requests.append((asked, request_of(self._model, asked.index, asked.arguments)))
            except Exception as error:
                self._keep(asked, None, [], "error", error)
        return requests

    def _next(self) -> _Asked | None:
        if self._waiting:
            return self._waiting.popleft()
        try:
            arguments = next(self._prompts, None)
        except Exception as error:  # nothing more is read; those that go on do so
            self._error = self._error or error
            return None
        if arguments is None:
            return None
        self._results.append(None)
        return _Asked(len(self._results) - 1, arguments)

    # -- Rows --------------------------------------------------------------------------------------

    def _note(self, results: list[Ran]) -> None:
        """Keep what a run has given the rows, and let go of those that have ended."""
        lacks_memory = False
        for going, ran in zip(list(self._going), results, strict=True):
            going.parts.append(ran)
            try:
                self._show(going)
            except Exception as error:
                self._end(going, "error", error)
                continue
            if ran.reason == "memory":
                lacks_memory = True
            elif ran.reason != "time" and ran.reason != "logits":
                self._end(going, ran.reason)
        if lacks_memory and len(self._going) == len(results):  # otherwise some has come free
            youngest = max(self._going, key=lambda going: going.asked.index)
            self._give_way([youngest], MemoryError("no memory for the bytes to come"))

    def _show(self, going: _Going) -> None:
        """Give the callback the bytes that it has not had."""
        count, asked = going.count(), going.asked
        if self._on_bytes is None or count <= asked.shown:
            return
        data = to_bytes(going.parts[-1].ids[asked.shown - count :])
        asked.shown = count
        if data:
            self._on_bytes(asked.index, data)

    def _give_way(self, given_up: list[_Going], error: MemoryError) -> None:
        """Have prompts wait until others are over, as there is no memory for so many rows.

        They begin again then, and the same bytes will be chosen again.
        """
        if len(self._going) == 1:
            return self._end(self._going[0], "memory", error)
        for going in reversed(given_up):
            self._waiting.appendleft(going.asked)
            self._let_go(going)
        self._limit = max(len(self._going), len(given_up) // 2)

    def _end(self, going: _Going, reason: FinishReason, error: Exception | None = None) -> None:
        self._keep(going.asked, going.request, going.parts, reason, error)
        self._let_go(going)
        self._limit = min(self._limit + 1, self._max_rows)

    def _let_go(self, going: _Going) -> None:
        self._going.remove(going)
        self._cache.drop([going.row])

    def _keep(
        self,
        asked: _Asked,
        request: Request | None,
        parts: list[Ran],
        reason: FinishReason,
        error: BaseException | None,
    ) -> None:
        seed = asked.arguments["seed"]
        self._results[asked.index] = generation_of(request, parts, reason, seed, error)
        self._error = self._error or error
        self._on_end()

    def _settle(self, going: _Going) -> None:
        """Note what a run chose before it raised, or before its results were noted."""
        (length,) = self._cache.lengths([going.row])
        missed = length - len(going.request.prompt) - going.count()
        if missed > 0:
            (last,) = self._cache.last([going.row])
            log_probs = None if last.log_probs is None else last.log_probs[-missed:]
            going.parts.append(Ran(last.ids[-missed:], log_probs, last.reason))
