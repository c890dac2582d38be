"""A session: incremental decoding that the user holds, feeds, forks, saves and resumes."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mblm.inference.fingerprint import fingerprint
from mblm.inference.hierarchy_cache import DecodableHierarchy, HierarchyCache
from mblm.inference.ragged_cache import RaggedCache
from mblm.inference.sampling import Sampler
from mblm.ops.packing import WEIGHT_TYPES
from mblm.utils.atomic import atomic_write
from mblm.utils.checks import check_finite_weights, check_integer, check_token_ids
from mblm.utils.modes import own_copy
from mblm.utils.transforms import decoding

_FORMAT = "mblm-session-4"
# Compiled code samples a local patch of bytes at a time, at most so many, and twice as many while
# that takes less than so many seconds: the user is to see bytes as they come and may interrupt.
_FIRST_RUN = 32
_MAX_RUN = 512
_RUN_SECONDS = 0.02


class Session:
    """Incremental decoding of one or more sequences, of equal or of different lengths.

    The weights of the model must not change while a session lives. Dropout is as the model's mode
    says: call ``model.eval()`` first.

    Args:
        model: An `mblm.MBLM`.
        batch_size: Sequences decoded side by side, B. Default 1.
        weights: What compiled code on a CPU reads the weights of linear layers as: ``"float32"``,
            the model's own; ``"bfloat16"``; or ``"int8"`` with one scale per output row. The last
            two are rounded once, here, and read faster for it. What is generated and what is fed a
            few bytes at a time is computed with them; long prompts, custom stages, and models of
            another dtype are not affected.

    Raises:
        ValueError: ``batch_size`` below 1, unknown ``weights``, or weights that are NaN or
            infinite.
    """

    @torch.inference_mode()
    @decoding
    def __init__(self, model: Any, batch_size: int = 1, *, weights: str = "float32") -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        _check_weights(weights)
        check_finite_weights(model)
        self._model: DecodableHierarchy = model
        self._weights = weights
        self._advanced: HierarchyCache | RaggedCache = HierarchyCache(model, batch_size, weights)

    # The bytes (B,) that compiled code is to take in with what it does next, if any.
    _pending: torch.Tensor | None = None
    _run_size = 0  # bytes of the last run, by the time that it took; the next begins with as many

    @property
    def _cache(self) -> HierarchyCache | RaggedCache:
        """The state after all bytes."""
        self._settle()
        return self._advanced

    @torch.inference_mode()
    def _settle(self) -> None:
        if self._pending is not None and isinstance(self._advanced, HierarchyCache):
            self._advanced.feed(self._pending[:, None])
            self._pending = None

    @property
    def _device(self) -> torch.device:
        return self._model.device

    @property
    def length(self) -> int:
        """Bytes taken in so far, by the longest sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Bytes taken in so far, per sequence."""
        if isinstance(self._advanced, RaggedCache):
            return self._advanced.lengths
        length = self._advanced.length + (self._pending is not None)
        return [length] * self._advanced.batch_size

    @property
    def batch_size(self) -> int:
        """Sequences decoded side by side."""
        return len(self.lengths)

    @decoding
    @torch.inference_mode()
    def feed(self, ids: torch.Tensor | bytes | Sequence[torch.Tensor | bytes]) -> "Session":
        """Take in the next bytes; returns the session.

        Args:
            ids: Token ids ``(B, L)``, or ``(L,)`` for a batch of one, of any integer dtype; or
                bytes, for a batch of one; or a list of B such ``(L,)`` or bytes, of different
                lengths. L = 0 does nothing.

        Raises:
            TypeError: Not integers.
            ValueError: A bad shape, an id outside the vocabulary, more bytes than the context, or
                different lengths after a beginning in common with a custom stage model whose state
                cannot be split. The session is as before.
        """
        rows = self._check_fed(ids)
        self._check_room([len(row) for row in rows])
        is_equal = len({len(row) for row in rows}) == 1
        cache = self._cache
        if is_equal and isinstance(cache, HierarchyCache):
            if len(rows[0]):
                cache.feed(torch.stack(rows).to(self._device))
        else:
            self._split().feed([row.to(self._device) for row in rows])
        return self

    def _check_fed(self, ids: Any) -> list[torch.Tensor]:
        """One tensor ``(L,)`` for each sequence."""
        num_tokens = self._model.num_tokens
        if isinstance(ids, (list, tuple)):
            if len(ids) != self.batch_size:
                raise ValueError(
                    f"ids: expected a list of {self.batch_size}, the session's batch, got "
                    f"{len(ids)}"
                )
            rows = [
                check_token_ids(f"ids[{index}]", _as_tensor(row), num_tokens)
                for index, row in enumerate(ids)
            ]
            for index, row in enumerate(rows):
                if row.ndim != 1:
                    raise ValueError(f"ids[{index}]: expected shape (L,), got {tuple(row.shape)}")
            return rows
        ids = check_token_ids("ids", _as_tensor(ids), num_tokens)
        if ids.ndim == 1 and self.batch_size == 1:
            ids = ids[None]
        if ids.ndim != 2 or ids.shape[0] != self.batch_size:
            raise ValueError(
                f"ids: expected shape ({self.batch_size}, L) for the session's batch of "
                f"{self.batch_size}, got {tuple(ids.shape)}"
            )
        return list(ids.unbind())

    def _split(self) -> RaggedCache:
        """From here on, the sequences may be of different lengths."""
        cache = self._cache
        if isinstance(cache, RaggedCache):
            return cache
        if cache.length:
            rows = cache.split()
        else:  # a custom stage's state need not be split
            one = HierarchyCache(self._model, 1, self._weights)
            rows = [one, *(one.fork() for _ in range(1, self.batch_size))]
        self._advanced = RaggedCache(rows)
        return self._advanced

    @decoding
    def logits(self) -> torch.Tensor:
        """Logits of the next byte, ``(B, V)``: the caller's own, of use in a loss too."""
        with torch.inference_mode():
            logits = self._cache.logits()
        return own_copy(logits)

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
        """
        sampler = Sampler(temperature, filter_thres, top_p, generator)
        num_tokens = check_integer("num_tokens", num_tokens)
        if num_tokens < 0:
            raise ValueError(f"num_tokens: expected a number >= 0, got {num_tokens}")
        self._check_room([num_tokens] * self.batch_size)
        with torch.inference_mode():
            runs = list(self._runs(num_tokens, sampler))
            if runs:
                self._append(runs[-1][:, -1])
        runs = runs or [torch.empty(self.batch_size, 0, dtype=torch.long, device=self._device)]
        with torch.inference_mode(False):  # the caller's own, as `logits`
            return torch.cat(runs, dim=1).to(self._device)

    def _append(self, ids: torch.Tensor) -> None:
        """Take in one more byte of every sequence, ids ``(B,)``: now, or with what comes next."""
        cache = self._advanced
        if isinstance(cache, HierarchyCache) and cache.goes_on:
            self._pending = ids.clone()
        else:
            self.feed(ids[:, None])

    def sample(
        self, num_tokens: int, sampler: Sampler, ends: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield ``num_tokens`` sampled bytes, ids ``(B,)``, of which the last is not taken in.

        They come in runs, so that several may be taken in before the first is yielded; a run ends
        after a byte of ``ends (V,)``, bool. Must run under ``torch.inference_mode``. Those that a
        GPU samples in compiled code are yielded on the CPU.
        """
        for run in self._runs(num_tokens, sampler, ends):
            yield from run.unbind(dim=1)

    def _runs(
        self, num_tokens: int, sampler: Sampler, ends: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """`sample` with all bytes of a run at once, ids ``(B, n)``."""
        cache = self._advanced
        if isinstance(cache, RaggedCache):
            for token in cache.sample(num_tokens, sampler):
                yield token[:, None]
            return
        if cache.device_run is not None and cache.device_run.runs(cache):
            for token in cache.device_run.sample(cache, num_tokens, sampler, ends):
                yield token[:, None]
            return
        last = self._pending
        first = min(self._model.seq_lens[-1], _FIRST_RUN)
        size = max(first, self._run_size)
        while num_tokens > 0:
            begin = time.perf_counter()
            run = cache.run(last, min(num_tokens, size), sampler, ends)
            self._pending = None
            seconds = time.perf_counter() - begin
            if seconds > 2 * _RUN_SECONDS:
                size = max(first, size // 2)
            elif seconds < _RUN_SECONDS and run.shape[1] == size:
                size = min(2 * size, _MAX_RUN)
            self._run_size = size
            num_tokens -= run.shape[1]
            last = run[:, -1]
            yield run

    @decoding
    def fork(self) -> "Session":
        """An independent copy that goes on from here."""
        other = object.__new__(Session)
        other._model, other._weights = self._model, self._weights
        other._run_size = self._run_size
        with torch.inference_mode():
            other._advanced = self._advanced.fork()
            other._pending = self._pending
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, to be resumed by `Session.load`."""
        from safetensors.torch import save

        tensors: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            structure = _flatten(self._cache.snapshot(), tensors)
        header = {
            "format": _FORMAT,
            "batch_size": str(self.batch_size),
            "weights": self._weights,
            "is_ragged": str(isinstance(self._cache, RaggedCache)),
            "model": fingerprint(self._model),
            "structure": json.dumps(structure),
        }
        with atomic_write(path) as file:
            file.write(save(tensors, header))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "Session":
        """Resume a saved session with the same model, its weights read as they were.

        Raises:
            ValueError: Not a session, a damaged one, or one of another release or of a model with
                other weights or another configuration; the message names the file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a saved session ({error})") from error
        if (given := header.get("format", "none")) != _FORMAT:
            if given.startswith(_FORMAT.rstrip("0123456789")):
                raise ValueError(
                    f"{path}: saved by another release, in format {given}; this one reads "
                    f"{_FORMAT}: feed the bytes again"
                )
            raise ValueError(f"{path}: not a saved session, format is {given}")
        if header.get("model") != fingerprint(model):
            raise ValueError(f"{path}: the session is another model's, or its weights have changed")
        try:
            batch_size, weights = int(header["batch_size"]), header["weights"]
            is_ragged = header["is_ragged"] == "True"
            state = _unflatten(json.loads(header["structure"]), tensors)
            _check_weights(weights)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: a damaged session ({error!r})") from error
        session = cls(model, batch_size, weights=weights)
        try:
            with torch.inference_mode():
                if is_ragged:
                    session._split()
                session._cache.restore(state)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a damaged session ({error!r})") from error
        return session

    def _check_room(self, counts: Sequence[int]) -> None:
        limit = self._model.max_length
        for length, count in zip(self.lengths, counts, strict=True):
            if limit is not None and length + count > limit:
                raise ValueError(
                    f"{length} bytes and {count} more exceed the context of {limit} bytes, which "
                    f"fixed positions of stage 1 limit"
                )


def _as_tensor(ids: Any) -> Any:
    if not isinstance(ids, (bytes, bytearray, memoryview)):
        return ids
    if not ids:  # of which frombuffer makes no tensor
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(ids), dtype=torch.uint8)


def _check_weights(weights: str) -> None:
    if weights not in WEIGHT_TYPES:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHT_TYPES)}, got {weights!r}")


def _flatten(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Structure of a nest as JSON; its tensors are collected by name."""
    if isinstance(state, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = state.clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(state, (list, tuple)):
        return [_flatten(item, tensors) for item in state]
    return state


def _unflatten(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(structure, dict):
        return tensors[structure["tensor"]]
    if isinstance(structure, list):
        return tuple(_unflatten(item, tensors) for item in structure)
    return structure
