"""The generation loop behind `MBLM.generate`: a prompt in, bytes out, streamed as they come."""

import io
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm
from typing_extensions import Unpack

from mblm.inference.continuation import Continuation, Course, begun
from mblm.inference.prompt import Prompt
from mblm.inference.request import request
from mblm.inference.wishes import Wishes
from mblm.utils.stream import ByteStreamer

# What `MBLM.generate` calls them.
_NAMES = {
    "prompt": "prime",
    "max_bytes": "num_tokens_to_generate",
    "end_token_id": "end_of_gen_token_id",
}


def generate(
    model: Any,
    prime: Prompt | None = None,
    stream: ByteStreamer | None = None,
    *,
    weights: str = "float32",
    enable_progress: bool = True,
    **wishes: Unpack[Wishes],
) -> torch.Tensor:
    """Generate bytes after a prompt, under ``torch.inference_mode``; see `mblm.MBLM.generate`."""
    _check_stream(stream)
    asked = request(model, b"" if prime is None else prime, names=_NAMES, **wishes)
    continuation: Continuation | None = None
    course: Course | None = None
    written: list[int] = []
    is_writing = False
    try:
        continuation, course = begun(model, asked, weights)
        is_shown = stream is None and enable_progress
        total = asked.plan.max_tokens
        with tqdm(total=total, unit="B", leave=False) if is_shown else nullcontext() as bar:
            while continuation.going:
                for _, ran in continuation.run():
                    if bar is not None:
                        bar.update(len(ran.ids))
                    for token in ran.ids.tolist() if stream is not None else ():
                        written.append(token)
                        is_writing = True
                        if not _write(stream, token):
                            return _joined(model, asked.prompt, written)
                        is_writing = False
        is_writing = stream is not None
        _write(stream, None)
        return _joined(model, asked.prompt, course.ids())
    except BaseException as error:
        ids: torch.Tensor | list[int] = written
        if not is_writing and continuation is not None and course is not None:
            continuation.settle()
            ids = course.ids()
        error.ids = _joined(model, asked.prompt, ids)  # type: ignore[attr-defined]
        raise


def _joined(model: Any, prompt: torch.Tensor, ids: torch.Tensor | list[int]) -> torch.Tensor:
    with torch.inference_mode(False):  # the caller's own
        ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
        return torch.cat((prompt, ids)).to(model.device)


def _check_stream(stream: Any) -> None:
    if stream is None:
        return
    if isinstance(stream, io.IOBase) or not callable(getattr(stream, "write", None)):
        raise TypeError(
            f"stream: expected a ByteStreamer, got {type(stream).__name__}; wrap a file or a "
            "terminal, ByteStreamer(stream)"
        )


def _write(stream: ByteStreamer | None, token: int | None) -> bool:
    """Write a byte, or flush for None; False if there is nobody to read it any more."""
    if stream is None:
        return True
    try:
        if token is None:
            stream.flush()
        else:
            stream.write(token)
    except ConnectionError:
        return False
    return True
