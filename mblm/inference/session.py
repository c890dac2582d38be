"""A session: incremental decoding that the user holds, feeds, forks, saves and resumes."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch

from mblm.inference import session_file
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, ChangedModelError, Row
from mblm.inference.continuation import Continuation, generator_on
from mblm.inference.engine import cache_for
from mblm.inference.fingerprint import fingerprint
from mblm.inference.model import check_model
from mblm.inference.sampling import Sampler
from mblm.model.stage import has_values
from mblm.utils.checks import check_integer, check_token_ids
from mblm.utils.transforms import decoding

_T = TypeVar("_T")

_MOST_ROWS = 1 << 24


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
        TypeError: ``model`` is no `mblm.MBLM`.
        ValueError: ``batch_size`` below 1 or above 16,777,216, unknown ``weights``, or weights
            that are NaN or infinite.
    """

    @decoding
    def __init__(self, model: Any, batch_size: int = 1, *, weights: str = "float32") -> None:
        if type(batch_size) is not int or not 1 <= batch_size <= _MOST_ROWS:
            raise ValueError(
                f"batch_size: expected an integer from 1 to {_MOST_ROWS}, got {batch_size!r}"
            )
        cache = cache_for(model, weights)
        self._hold(model, model.device, weights, cache, cache.add(batch_size))

    def _hold(
        self, model: Any, device: torch.device, weights: str, cache: Cache, rows: list[Row]
    ) -> None:
        self._model, self._device, self._weights = model, device, weights
        self._cache, self._rows = cache, rows
        weakref.finalize(self, cache.drop, rows).atexit = False

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
    def feed(self, ids: torch.Tensor | bytes | Sequence[torch.Tensor | bytes]) -> "Session":
        """Take in the next bytes; returns the session.

        Args:
            ids: Token ids ``(B, L)``, or ``(L,)`` for a batch of one, of any integer dtype; or
                bytes, for a batch of one; or a list of B such ``(L,)`` or bytes, of different
                lengths. L = 0 does nothing.

        Raises:
            TypeError: Not integers.
            ValueError: A bad shape or layout, an id outside the vocabulary, or more bytes than the
                context.
            BaseException: Whatever is raised, Ctrl-C too, all bytes are taken in or none.
        """
        rows = self._check_fed(ids)
        self._check_room([len(row) for row in rows])
        self._on_cache(lambda cache: cache.feed(self._rows, rows))
        return self

    def _check_fed(self, ids: Any) -> list[torch.Tensor]:
        """One tensor ``(L,)`` int64 on the CPU for each sequence."""
        num_tokens = self._model.num_tokens
        if isinstance(ids, (list, tuple)):
            if len(ids) != self.batch_size:
                raise ValueError(
                    f"ids: expected a list of {self.batch_size}, the session's batch, got "
                    f"{len(ids)}"
                )
            rows = [
                check_token_ids(f"ids[{index}]", _as_tensor(f"ids[{index}]", row), num_tokens)
                for index, row in enumerate(ids)
            ]
            for index, row in enumerate(rows):
                if row.ndim != 1:
                    raise ValueError(f"ids[{index}]: expected shape (L,), got {tuple(row.shape)}")
            return [row.cpu() for row in rows]
        ids = check_token_ids("ids", _as_tensor("ids", ids), num_tokens)
        if ids.ndim == 1 and self.batch_size == 1:
            return [ids.cpu()]
        if ids.ndim != 2 or ids.shape[0] != self.batch_size:
            raise ValueError(
                f"ids: expected shape ({self.batch_size}, L) for the session's batch of "
                f"{self.batch_size}, got {tuple(ids.shape)}"
            )
        return list(ids.cpu().unbind())

    @decoding
    def logits(self) -> torch.Tensor:
        """Logits of the next byte, ``(B, V)``: the caller's own, of use in a loss too."""
        return self._on_cache(lambda cache: cache.logits(self._rows))

    @decoding
    def generate(
        self,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        filter_thres: float = 1.0,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Generate bytes for every sequence and take them in: ids ``(B, num_tokens)``.

        The sampling arguments are those of `mblm.inference.sampling.Sampler`.

        Raises:
            TypeError, ValueError: A bad argument, or more bytes than the context; nothing is
                generated.
            BaseException: Ctrl-C or an error on the way has what was generated and taken in before
                it as its attribute ``ids``, a list of ``(n,)`` for each sequence.
        """
        sampler = Sampler(temperature, filter_thres, top_p, generator)
        num_tokens = check_integer("num_tokens", num_tokens)
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected a number >= 0, got {num_tokens}")
        self._check_room([num_tokens] * self.batch_size)
        continuation: Continuation | None = None
        try:
            continuation = self.begin(num_tokens, sampler)
            for _ in continuation.runs():
                pass
            with torch.inference_mode(False):  # the caller's own, as `logits`
                ids = continuation.ids()
                rows = ids[0][None] if len(ids) == 1 else torch.stack(ids)
                return rows.to(self._device)
        except BaseException as error:
            none = [torch.empty(0, dtype=torch.long) for _ in self._rows]
            error.ids = none if continuation is None else continuation.settle()  # type: ignore[attr-defined]
            raise

    def begin(
        self, num_tokens: int, sampler: Sampler, stop: Automaton | None = None
    ) -> Continuation:
        """Plan how all sequences go on; each ends with the byte that makes ``stop`` accept."""
        numbers = generator_on(self._device, sampler.generator)
        return self._on_cache(
            lambda cache: Continuation(
                self._model, cache, self._rows, num_tokens, sampler, stop, numbers
            )
        )

    def _on_cache(self, call: Callable[[Cache], _T]) -> _T:
        """Call the cache, or another one where it cannot go on with what the model has become."""
        try:
            return call(self._cache)
        except ChangedModelError:
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
            left.drop(self._rows)
            self._hold(self._model, self._device, self._weights, cache, rows)
            return call(cache)

    @decoding
    def fork(self) -> "Session":
        """An independent copy that goes on from here."""
        other = object.__new__(Session)
        rows = self._cache.copy(self._rows)
        other._hold(self._model, self._device, self._weights, self._cache, rows)
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

    def _check_room(self, counts: Sequence[int]) -> None:
        if (limit := self._model.max_length) is None:
            return
        for length, count in zip(self.lengths, counts, strict=True):
            if length + count > limit:
                raise ValueError(
                    f"{length} bytes and {count} more exceed the context of {limit} bytes, which "
                    f"fixed positions of stage 1 limit"
                )


def _as_tensor(name: str, ids: Any) -> Any:
    if not isinstance(ids, (bytes, bytearray, memoryview)):
        return has_values(name, ids) if isinstance(ids, torch.Tensor) else ids
    if not ids:  # of which frombuffer makes no tensor
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(ids), dtype=torch.uint8)
