"""Pillow, imported when an image is first touched."""

from types import ModuleType


def pillow_image() -> ModuleType:
    """The module ``PIL.Image``.

    Raises:
        ImportError: Pillow is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'mblm[image]'") from error
    return Image
