"""Bytes in and out of text, tensors, arrays and files in memory."""

from __future__ import annotations

from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

DEFAULT_ENCODING = "utf8"


def pillow_image() -> ModuleType:
    """The module ``PIL.Image``, imported when an image is first touched.

    Raises:
        ImportError: Pillow is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'mblm[image]'") from error
    return Image


class Bytes:
    """Conversions between text, bytes and uint8 tensors ``(L,)``; text is UTF-8 by default."""

    @staticmethod
    def tensor_to_str(t: torch.Tensor, encoding: str = DEFAULT_ENCODING) -> str:
        """The text of a tensor of bytes of any integer dtype.

        Raises:
            ValueError: A value that is no byte, or bytes that are no text.
        """
        return bytes(t.tolist()).decode(encoding)

    @staticmethod
    def tensor_to_image(t: torch.Tensor) -> PILImage:
        """The Pillow image of a uint8 tensor ``(C, H, W)``."""
        return pillow_image().fromarray(t.permute(1, 2, 0).numpy())

    @staticmethod
    def str_to_tensor(s: str, encoding: str = DEFAULT_ENCODING) -> torch.Tensor:
        """The bytes of a text as a uint8 tensor."""
        return Bytes.bytes_to_tensor(Bytes.str_to_bytearray(s, encoding))

    @staticmethod
    def str_to_bytearray(s: str, encoding: str = DEFAULT_ENCODING) -> bytearray:
        """The bytes of a text, mutable."""
        return bytearray(Bytes.str_to_bytes(s, encoding))

    @staticmethod
    def str_to_bytes(s: str, encoding: str = DEFAULT_ENCODING) -> bytes:
        """The bytes of a text."""
        return s.encode(encoding)

    @staticmethod
    def bytes_to_str(b: bytes | bytearray, encoding: str = DEFAULT_ENCODING) -> str:
        """The text of bytes."""
        return b.decode(encoding)

    @staticmethod
    def byte_list_to_str(b: list[int], encoding: str = DEFAULT_ENCODING) -> str:
        """The text of a list of byte values."""
        return bytes(b).decode(encoding)

    @staticmethod
    def byte_list_to_str_safe(b: list[int], default: str, encoding: str = DEFAULT_ENCODING) -> str:
        """The text of a list of byte values, or ``default`` where they are no bytes or no text."""
        try:
            return Bytes.byte_list_to_str(b, encoding)
        except (ValueError, TypeError, LookupError):
            return default

    @staticmethod
    def bytes_to_tensor(b: bytes | bytearray) -> torch.Tensor:
        """Bytes as a uint8 tensor, which shares the memory of a ``bytearray``."""
        if not b:  # frombuffer refuses an empty buffer
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(b) if isinstance(b, bytes) else b, dtype=torch.uint8)


class FileStream:
    """A file in memory, such as an encoded image."""

    def __init__(self, buffer: BytesIO) -> None:
        self._buffer = buffer

    def to_numpy(self) -> NDArray[np.uint8]:
        """The bytes as a read-only array ``(L,)``."""
        return np.frombuffer(self._buffer.getvalue(), dtype=np.uint8)

    def to_tensor(self) -> torch.Tensor:
        """The bytes as a uint8 tensor ``(L,)`` on the same memory."""
        buffer = self._buffer.getbuffer()
        if not buffer:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def to_buffer(self) -> bytes:
        """The bytes themselves."""
        return self._buffer.getvalue()

    def to_image(self) -> PILImage:
        """The bytes decoded by Pillow, in the color space that the file says."""
        return pillow_image().open(self._buffer)
