"""Bytes or text as they are generated, by iteration, in an event loop too."""

import asyncio
import codecs
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import Unpack

from mblm.inference.continuation import Continuation, Course, begun
from mblm.inference.generation import Generation
from mblm.inference.prompt import Prompt, to_bytes
from mblm.inference.request import Wishes, check_names, request
from mblm.utils.transforms import decoding

Chunk = bytes | str


class Stream(
    Iterator[Chunk],
    AsyncIterator[Chunk],
    AbstractContextManager["Stream"],
    AbstractAsyncContextManager["Stream"],
):
    """What is generated after a prompt, in chunks of about 20 ms.

    ``async for`` leaves the event loop free: other threads generate. A stream can be closed at any
    time, from any thread, and is closed when its context is left. What is raised on the way is in
    `result`, with all that was generated before it.

    Args:
        model: An `mblm.MBLM`.
        prompt: See `mblm.inference.prompt.prompt_ids`.
        text: Give text, whole characters only, instead of bytes. What is no UTF-8 becomes U+FFFD.
        weights: Type of the weights that compiled code reads; see `mblm.inference.session.Session`.
        wishes: See `mblm.inference.request.Wishes`.

    Raises:
        TypeError, ValueError: Bad input. Weights that are NaN are told of with the first chunk.
    """

    @decoding
    def __init__(
        self, model: Any, prompt: Prompt, text: bool, weights: str, **wishes: Unpack[Wishes]
    ) -> None:
        check_names("stream", wishes, Wishes.__optional_keys__)
        self._model, self._weights = model, weights
        asked = request(model, prompt, **wishes)
        # It is read later, when the caller's tensor may have changed.
        self._course = Course(replace(asked, prompt=asked.prompt.clone()))
        self._seed = wishes.get("seed")
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoder = decoder(errors="replace") if text else None
        self._continuation: Continuation | None = None
        self._result: Generation | None = None
        self._is_closed = False
        self._lock = threading.RLock()  # held by the thread that generates

    @property
    def result(self) -> Generation:
        """All that was generated, once the stream is over or closed.

        Raises:
            RuntimeError: It goes on.
        """
        if self._is_closed:
            with self._lock:  # until a thread that generates has ended
                self._end("closed")
        if self._result is None:
            raise RuntimeError("result: the stream goes on; read it to its end, or close it")
        return self._result

    def __next__(self) -> Chunk:
        while (chunk := self._next()) is None:
            self._advance()
        if not chunk:
            raise StopIteration
        return chunk

    async def __anext__(self) -> Chunk:
        while (chunk := self._next()) is None:
            await asyncio.to_thread(self._advance)
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _next(self) -> Chunk | None:
        """What was generated and not given yet; empty at the end, None if more is to come."""
        if self._is_closed:
            return b""
        is_over = self._result is not None
        data = to_bytes(self._course.fresh())
        chunk = data if self._decoder is None else self._decoder.decode(data, final=is_over)
        return chunk if chunk or is_over else None

    def _advance(self) -> None:
        """Generate for 20 ms."""
        with self._lock, torch.inference_mode():
            if self._is_closed or self._result is not None:
                return
            continuation = self._continuation
            try:
                if continuation is None:
                    continuation = begun(self._model, self._course, self._weights)
                    self._continuation = continuation
                if continuation.going and not self._is_closed:
                    continuation.run()
                if not continuation.going:
                    self._end(self._course.reason)
                    if self._result is not None and self._result.error is not None:
                        raise self._result.error
            except BaseException as error:
                self._end("error", error)
                self._is_closed = True
                if isinstance(error, StopIteration):  # which would end the iteration
                    raise RuntimeError("a logits processor raised StopIteration") from error
                raise
            finally:
                if self._is_closed:
                    self._continuation = None

    def _end(self, reason: Any, error: BaseException | None = None) -> None:
        """Keep the result alone."""
        if self._result is None:
            self._result = self._course.result(reason, self._seed, error)
            self._continuation = None

    def close(self) -> None:
        """End it: no chunk comes any more. A thread that generates ends within 20 ms."""
        self._is_closed = True
        self._continuation = None

    async def aclose(self) -> None:
        """`close`, as `contextlib.aclosing` wants it."""
        self.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aexit__(self, *_: object) -> None:
        self.close()
