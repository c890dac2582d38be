"""The generation loop behind `MBLM.generate`: a prompt in, bytes out, streamed as they come."""

import io
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from mblm.inference.continuation import Course, begun
from mblm.inference.prompt import Prompt
from mblm.inference.request import Filters, check_names, request
from mblm.utils.naming import naming
from mblm.utils.stream import ByteStreamer

# What `MBLM.generate` calls them.
_NAMES = {
    "prompt": "prime",
    "max_bytes": "num_tokens_to_generate",
    "end_token_id": "end_of_gen_token_id",
}


def generate(
    model: Any,
    prime: Prompt | None,
    stream: ByteStreamer | None,
    wishes: Mapping[str, Any],
    *,
    weights: str,
    enable_progress: bool,
    **own: Any,
) -> torch.Tensor:
    """Generate bytes after a prompt, under ``torch.inference_mode``; see `mblm.MBLM.generate`."""
    if isinstance(stream, io.IOBase) or not (stream is None or hasattr(stream, "write")):
        raise TypeError(
            f"stream: expected a ByteStreamer, got {type(stream).__name__}; wrap a file or a "
            "terminal, ByteStreamer(stream)"
        )
    check_names("generate", wishes, Filters.__optional_keys__)
    with naming(**_NAMES):
        course = Course(request(model, b"" if prime is None else prime, **own, **wishes))
    try:
        continuation = begun(model, course, weights)
        is_shown = stream is None and enable_progress
        total = course.request.plan.max_tokens
        with tqdm(total=total, unit="B", leave=False) if is_shown else nullcontext() as bar:
            while continuation.going:
                continuation.run()
                ids = course.fresh()
                if bar is not None:
                    bar.update(len(ids))
                if stream is not None and not _write(stream, ids):
                    break
            else:
                if stream is not None:
                    _write(stream, None)
        return _joined(model, course)
    except BaseException as error:
        error.ids = _joined(model, course)  # type: ignore[attr-defined]
        raise


def _joined(model: Any, course: Course) -> torch.Tensor:
    with torch.inference_mode(False):  # the caller's own
        return torch.cat((course.request.prompt, course.ids())).to(model.device)


def _write(stream: ByteStreamer, ids: torch.Tensor | None) -> bool:
    """Write bytes, or flush for None; False if there is nobody to read it any more."""
    try:
        if ids is None:
            stream.flush()
        else:
            for token in ids.tolist():
                stream.write(token)
    except ConnectionError:
        return False
    return True
