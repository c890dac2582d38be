"""A session: incremental decoding that the user holds, feeds, forks, saves and resumes."""

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch

from mblm.inference import session_file
from mblm.inference.arguments import MOST_ROWS, check_model
from mblm.inference.cache import Cache, ChangedModelError, Row
from mblm.inference.continuation import Continuation, Course
from mblm.inference.engine import cache_for
from mblm.inference.fingerprint import fingerprint
from mblm.inference.prompt import Prompt, as_ids, prompt_ids
from mblm.inference.request import Filters, Request, check_names, requests_of_rows
from mblm.ops import _native
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.naming import naming
from mblm.utils.transforms import decoding

_T = TypeVar("_T")

_WISHES = Filters.__optional_keys__ | {"temperature", "filter_thres"}
_NUMBERS = frozenset((int, float, bool, type(None)))


class Session:
    """Incremental decoding of one or more sequences, of equal or of different lengths.

    Dropout is as the model's mode says: call ``model.eval()`` first. ``copy.deepcopy`` of a session
    is a `fork`; it cannot be pickled, but saved.

    Args:
        model: An `mblm.MBLM`.
        batch_size: Sequences decoded side by side, B. Default 1.
        weights: What compiled code reads the weights of linear layers as: ``"float32"``,
            the model's own; ``"bfloat16"``; or ``"int8"`` with one scale per output row. The last
            two are rounded once, here, and read faster for it. What is generated and what is fed a
            few bytes at a time is computed with them; long prompts, custom stages, and models of
            another dtype are not affected.

    Raises:
        TypeError: ``model`` is no `mblm.MBLM`, or ``batch_size`` no integer.
        ValueError: ``batch_size`` below 1 or above 16,777,216, unknown ``weights``, or weights
            that are NaN or infinite.
    """

    _user: int | None = None  # the thread whose call is going on

    @decoding
    def __init__(self, model: Any, batch_size: int = 1, *, weights: str = "float32") -> None:
        batch_size = check_integer("batch_size", batch_size)
        if not 1 <= batch_size <= MOST_ROWS:
            raise ValueError(f"batch_size: expected 1 to {MOST_ROWS}, got {batch_size}")
        cache = cache_for(model, weights)
        self._in_use = threading.RLock()  # a logits processor may ask the session that calls it
        self._hold(model, model.device, weights, cache, cache.add(batch_size))

    def _hold(
        self, model: Any, device: torch.device, weights: str, cache: Cache, rows: list[Row]
    ) -> None:
        self._model, self._device, self._weights = model, device, weights
        self._is_on_cpu = device.type == "cpu"
        self._cache, self._rows = cache, rows
        # What `generate` was asked for last, the context that it has to fit, and what it means.
        self._asked: tuple[dict[str, Any], int | None, list[Request], bool] = ({}, None, [], False)
        self._let_go = weakref.finalize(self, cache.drop, rows)
        self._let_go.atexit = False

    @property
    def length(self) -> int:
        """Bytes taken in so far, by the longest sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Bytes taken in so far, per sequence."""
        return self._cache.lengths(self._rows)

    @property
    def batch_size(self) -> int:
        """Sequences decoded side by side."""
        return len(self._rows)

    @decoding
    def feed(self, ids: Prompt | Sequence[Prompt]) -> "Session":
        """Take in the next bytes; returns the session.

        Args:
            ids: For a batch of one, bytes, text (UTF-8) or token ids, ``(L,)`` of any integer
                dtype; otherwise ids ``(B, L)``, or a list of one of the former for each sequence,
                of different lengths. L = 0 does nothing.

        Raises:
            TypeError: Something else.
            ValueError: A bad shape or layout, an id outside the vocabulary, more bytes than the
                context, or another thread's call is going on.
            BaseException: Whatever is raised, Ctrl-C too, all bytes are taken in or none.
        """
        rows = self._check_fed(ids)
        self._on_cache(lambda cache: cache.feed(self._rows, rows))
        return self

    def _check_fed(self, ids: Any) -> Sequence[bytes | torch.Tensor]:
        """Bytes, or one tensor ``(L,)`` int64 on the CPU, for each sequence."""
        num_tokens, batch_size = self._model.num_tokens, self.batch_size
        if type(ids) is bytes and batch_size == 1 and num_tokens >= 256:
            return [ids]
        if isinstance(ids, (list, tuple)) and any(hasattr(row, "__len__") for row in ids[:1]):
            if len(ids) != batch_size:
                raise ValueError(
                    f"ids: expected a list of {batch_size}, the session's batch, got {len(ids)}"
                )
            return [prompt_ids(f"ids[{i}]", row, num_tokens) for i, row in enumerate(ids)]
        if batch_size == 1:
            return [prompt_ids("ids", ids, num_tokens)]
        given = check_token_ids("ids", as_ids("ids", ids), num_tokens)
        if given.ndim != 2 or given.shape[0] != batch_size:
            raise ValueError(
                f"ids: expected shape ({batch_size}, L) for the session's batch of {batch_size}, "
                f"got {tuple(given.shape)}"
            )
        return list(given.cpu().unbind())

    @decoding
    def logits(self) -> torch.Tensor:
        """Logits of the next byte, ``(B, V)``: the caller's own, of use in a loss too."""
        return self._on_cache(lambda cache: cache.logits(self._rows))

    @decoding
    def generate(
        self,
        num_tokens: int | Sequence[int],
        *,
        end_of_gen_token_id: int | Sequence[int | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        generator: torch.Generator | None = None,
        **wishes: Any,
    ) -> Any:
        """Generate bytes for every sequence and take them in.

        Each argument but ``generator`` is one value or a list of one for each sequence; see
        `mblm.inference.request.Wishes`. Further ones: ``temperature``, ``filter_thres``, ``top_k``,
        ``top_p``, ``min_p``, ``stop``, ``constraint``, ``logits_processor``, ``draft``. Of one
        generator, seeded or not, the n-th bytes of all sequences have the n-th numbers ``(B, V)``;
        with a list of seeds, each sequence has its own. A logits processor gets the ids that this
        call has generated.

        Returns:
            Ids ``(B, num_tokens)`` int64 on the model's device. Where sequences may end at
            different lengths, by ``stop``, ``end_of_gen_token_id``, ``constraint`` or a list of
            ``num_tokens``: a list of ``(n,)`` for each.

        Raises:
            TypeError, ValueError: A bad argument, or more bytes than the context; nothing is
                generated.
            BaseException: Ctrl-C or an error on the way has what was generated and taken in before
                it as its attribute ``ids``, a list of ``(n,)`` for each sequence.
        """
        check_names("generate", wishes, _WISHES)
        asked = dict(
            max_bytes=num_tokens,
            end_token_id=end_of_gen_token_id,
            seed=seed,
            generator=generator,
            log_probs=False,
            **wishes,
        )
        courses: list[Course] = []
        try:
            return self._on_cache(lambda cache: self._continue(cache, courses, asked), courses)
        except BaseException as error:
            nothing = [torch.empty(0, dtype=torch.long) for _ in range(self.batch_size)]
            error.ids = [course.ids() for course in courses] or nothing  # type: ignore[attr-defined]
            raise

    def _continue(self, cache: Cache, courses: list[Course], asked: dict[str, Any]) -> Any:
        requests, is_ragged = self._requests(asked)
        courses[:] = map(Course, requests)
        continuation = Continuation(cache)
        continuation.add(self._rows, courses)
        while continuation.going:
            continuation.run()
        ids = [course.ids() for course in courses]
        own = ids if is_ragged else [_stacked(ids)]
        if not self._is_on_cpu:
            with torch.inference_mode(False):  # the caller's own, as `logits`
                own = [tensor.to(self._device) for tensor in own]
        return own if is_ragged else own[0]

    def _requests(self, wishes: dict[str, Any]) -> tuple[list[Request], bool]:
        """What is asked for, checked, and whether sequences may end at different lengths.

        Where the same is asked for again, it is what it was.
        """
        asked, limit, requests, is_ragged = self._asked
        is_same = [*wishes] == [*asked] and all(map(operator.is_, wishes.values(), asked.values()))
        if is_same and (limit is None or self.length + requests[0].plan.max_tokens <= limit):
            return requests, is_ragged
        with naming(max_bytes="num_tokens", end_token_id="end_of_gen_token_id"):
            requests = requests_of_rows(self._model, self.lengths, wishes)
        is_ragged = isinstance(wishes["max_bytes"], (list, tuple, range))
        is_ragged = is_ragged or any(request.may_end_early for request in requests)
        # Numbers ask for the same again, where there are no draws of their own.
        are_numbers = _NUMBERS.issuperset(map(type, wishes.values()))
        kept = wishes if are_numbers and requests[0].plan.draws is None else {}
        self._asked = kept, self._model.max_length, requests, is_ragged
        return requests, is_ragged

    def _on_cache(self, call: Callable[[Cache], _T], courses: Sequence[Course] = ()) -> _T:
        """Call the cache, or another one where it cannot go on with what the model has become.

        A second thread is refused, whose calls would take bytes from those of the first.
        """
        own, before = threading.get_ident(), self._user
        if before not in (None, own):
            raise ValueError(
                "session: in another thread's call at this time; fork it, one for each thread"
            )
        with self._in_use:  # which no signal comes into; a thread that comes just now waits
            try:
                self._user = own
                return call(self._cache)
            except ChangedModelError:
                if any(course.ids().numel() for course in courses):
                    raise  # another cache would choose again what is chosen
                self._change_cache()
                return call(self._cache)
            finally:
                self._user = before

    def _change_cache(self) -> None:
        """Go on in another cache, for what the model has become."""
        left = self._cache
        states = [left.state_so_far(row) for row in self._rows]
        cache = cache_for(self._model, self._weights)
        rows = cache.add(len(states))
        try:
            for row, state in zip(rows, states, strict=True):
                cache.set_state(row, state)
        except ValueError as error:
            raise ValueError(
                "the model is another than the session began with, and cannot go on from what "
                f"that has taken in; start a new session ({error})"
            ) from error
        let_go = self._let_go
        self._hold(self._model, self._device, self._weights, cache, rows)
        let_go()

    @decoding
    def fork(self) -> "Session":
        """An independent copy that goes on from here."""
        other = object.__new__(Session)
        other._in_use = threading.RLock()
        own = self._model, self._device, self._weights
        self._on_cache(lambda cache: other._hold(*own, cache, cache.copy(self._rows)))
        return other

    def __copy__(self) -> "Session":
        return self.fork()

    def __deepcopy__(self, _: dict[int, Any]) -> "Session":
        return self.fork()

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a session cannot be pickled; Session.save and Session.load keep one in a file"
        )

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, to be resumed by `Session.load`."""
        header = {"model": fingerprint(self._model), "weights": self._weights}
        states = self._on_cache(lambda cache: [cache.state(row) for row in self._rows])
        session_file.write(path, header, states)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "Session":
        """Resume a saved session with the same model, its weights read as they were.

        Raises:
            OSError: No such file, or a folder.
            ValueError: Not a session, a damaged one, or one of another release or of a model with
                other weights or another configuration; the message names the file.
        """
        check_model(model)
        header, states = session_file.read(path)
        if header.get("model") != fingerprint(model):
            raise ValueError(f"{path}: the session is another model's, or its weights have changed")
        try:
            session = cls(model, len(states), weights=header["weights"])
            for row, state in zip(session._rows, states, strict=True):
                session._cache.set_state(row, state)
        except session_file.DAMAGE as error:
            raise ValueError(f"{path}: a damaged session ({error!r})") from error
        return session


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """Ids ``(n,)`` of rows as ``(B, n)``: the caller's own, as `Session.logits`."""
    library = _native.library()
    if library is not None:  # PyTorch's dispatcher would take as long as the rest of a short call
        stacked: torch.Tensor = library.stacked(rows)
        return stacked
    with torch.inference_mode(False):
        return torch.stack(rows)
