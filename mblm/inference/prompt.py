"""Token ids of what people pass as a prompt, and bytes and text of ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mblm.model.stage import has_values
from mblm.utils.checks import check_integer, check_token_ids

# One sequence: its bytes, UTF-8 text, or token ids, as tensor or array ``(L,)`` or ``(1, L)``.
Prompt = (
    bytes | bytearray | memoryview | str | Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[int]
)

_ANY_ID = 2**63
_NO_IDS = torch.empty(0, dtype=torch.long, device="cpu")


def prompt_ids(name: str, prompt: Any, num_tokens: int) -> Tensor:
    """The token ids of one sequence.

    Args:
        name: What errors call it.
        prompt: Bytes, text (UTF-8), or ids below ``num_tokens``: a tensor or an array of any
            integer dtype, ``(L,)`` or ``(1, L)``, or a list.
        num_tokens: V.

    Returns:
        ``(L,)`` int64 on the CPU.

    Raises:
        TypeError: Something else.
        ValueError: An id outside the vocabulary, another shape, or text that UTF-8 has no bytes
            for.
    """
    if isinstance(prompt, bytes) and (num_tokens >= 256 or not prompt):  # nothing can be wrong
        return _ids_of(prompt) if prompt else _NO_IDS
    ids = check_token_ids(name, as_ids(name, prompt), num_tokens)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"{name}: expected shape (L,), got {tuple(ids.shape)}")
    return ids.cpu()


def as_ids(name: str, given: Any) -> Tensor:
    """What is given as a tensor, not yet checked for its shape and range."""
    if isinstance(given, Tensor):
        return has_values(name, given)
    if isinstance(given, np.ndarray):
        if given.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integer token ids, got an array of {given.dtype}")
        return torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("=")))
    if isinstance(given, str):
        given = utf8(name, given)
    if isinstance(given, (bytes, bytearray, memoryview)):
        return _ids_of(given)
    if isinstance(given, Sequence):
        ids = [
            token if type(token) is int else check_integer(f"{name}[{index}]", token)
            for index, token in enumerate(given)
        ]
        try:
            return torch.from_numpy(np.array(ids, dtype=np.int64))
        except OverflowError:
            raise ValueError(f"{name}: {max(ids, key=abs)} is no token id") from None
    raise TypeError(f"{name}: expected bytes, text or token ids, got {type(given).__name__}")


def _ids_of(data: bytes | bytearray | memoryview) -> Tensor:
    """Bytes as ids ``(L,)`` int64."""
    return torch.from_numpy(np.frombuffer(bytes(data), np.uint8).astype(np.int64))


def utf8(name: str, text: str) -> bytes:
    """The bytes of a text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text that UTF-8 can encode: {error}") from None


def to_bytes(ids: Prompt) -> bytes:
    """The bytes that token ids are; ids from 256 on are none, and left out.

    Args:
        ids: A tensor or an array of any integer dtype, ``(L,)`` or ``(1, L)``, or a list.

    Raises:
        TypeError, ValueError: Something else, or a negative id.
    """
    flat = prompt_ids("ids", ids, _ANY_ID)
    return flat[flat < 256].to(torch.uint8).numpy().tobytes()


def to_text(ids: Prompt, errors: str = "replace") -> str:
    """The UTF-8 text that token ids are; see `to_bytes`.

    Args:
        ids: As of `to_bytes`.
        errors: What becomes of bytes that are no UTF-8, as in `bytes.decode`. Default: each is
            replaced by U+FFFD.

    Raises:
        UnicodeDecodeError: No UTF-8, with ``errors="strict"``.
    """
    return to_bytes(ids).decode(errors=errors)
