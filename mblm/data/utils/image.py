"""Images cropped, resized, reduced to fewer values, and turned into bytes."""

from __future__ import annotations

from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mblm.data.utils.bytes import FileStream, pillow_image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class ColorSpace(str, Enum):
    """The color spaces, under Pillow's names."""

    RGB = "RGB"
    GRAY = "L"


BinMode = Literal["lower", "upper", "mean"]
"""Which value stands for a bin: its lower or upper edge, or their mean."""


class ImagePipeline:
    """An image on its way: the methods that change it return the pipeline.

    Args:
        image: A path, a Pillow image, a uint8 array ``(H, W, C)`` or a uint8 tensor
            ``(C, H, W)``; gray tensors and arrays are ``(H, W)``.
        color_space: What the image is converted to.

    Raises:
        OSError: A file that is missing, cannot be read, is no image (``UnidentifiedImageError``)
            or is damaged.
        TypeError: Nothing that an image can be made of.
        ValueError: An array of another dtype or shape.
        ImportError: Pillow is not installed.
    """

    MAX_NUM_CHANNELS = 256

    def __init__(
        self,
        image: str | Path | PILImage | NDArray[np.uint8] | torch.Tensor,
        color_space: ColorSpace,
    ) -> None:
        self._color_space = ColorSpace(color_space)
        if isinstance(image, (str, Path)):
            self._image = _read_image(image, self._color_space)
            return
        if isinstance(image, torch.Tensor):
            if self._color_space is ColorSpace.RGB:
                if image.ndim != 3:
                    raise ValueError(f"image: expected shape (C, H, W), got {tuple(image.shape)}")
                image = image.permute(1, 2, 0)
            image = image.numpy()
        if isinstance(image, np.ndarray):
            image = _image_of_array(image)
        if not isinstance(image, pillow_image().Image):
            raise TypeError(
                "image: expected a path, a Pillow image, an array or a tensor, "
                f"got {type(image).__name__}"
            )
        self._image = image.convert(self._color_space.value)

    def grayscale(self) -> ImagePipeline:
        """Drop the colors."""
        self._color_space = ColorSpace.GRAY
        self._image = self._image.convert(ColorSpace.GRAY.value)
        return self

    def resize(self, new_w_h: tuple[int, int]) -> ImagePipeline:
        """Resize to ``(width, height)`` in pixels, by Lanczos resampling."""
        self._image = self._image.resize(new_w_h, resample=pillow_image().Resampling.LANCZOS)
        return self

    def crop(self, factor_perc_h_w: tuple[float, float]) -> ImagePipeline:
        """Cut margins off on all four sides.

        Args:
            factor_perc_h_w: The share of the height that goes above and below each, and the share
                of the width that goes left and right each, such as 0.1.

        Raises:
            ValueError: A negative share, or nothing would be left.
        """
        width, height = self._image.size
        factor_h, factor_w = factor_perc_h_w
        left, top = int(min(width * factor_w, width / 2)), int(min(height * factor_h, height / 2))
        right, bottom = width - left, height - top
        if factor_h < 0 or factor_w < 0 or left >= right or top >= bottom:
            raise ValueError(
                f"factor_perc_h_w: expected shares from 0 to below 0.5 that leave some of "
                f"{height} x {width} pixels, got {factor_perc_h_w}"
            )
        self._image = self._image.crop((left, top, right, bottom))
        return self

    def downsample_channels(
        self, max_num_channel_values: int, bin_mode: BinMode = "mean"
    ) -> ImagePipeline:
        """Reduce a channel's 256 values to ``max_num_channel_values``, in bins of equal width.

        The range from 0 to 255 is cut into bins, and a value becomes its bin's lower or upper
        edge or their mean, rounded down. From 255 bins on, the image stays as it is.

        Raises:
            ValueError: Fewer than one bin, or an unknown mode.
        """
        if bin_mode not in get_args(BinMode):
            raise ValueError(f"bin_mode: expected one of {get_args(BinMode)}, got {bin_mode!r}")
        if max_num_channel_values < 1:
            raise ValueError(
                f"max_num_channel_values: expected at least 1, got {max_num_channel_values}"
            )
        if max_num_channel_values >= self.MAX_NUM_CHANNELS - 1:
            return self
        edges = np.linspace(0, self.MAX_NUM_CHANNELS - 1, max_num_channel_values + 1)
        lower, upper = edges[:-1], edges[1:]
        values = {"lower": lower, "upper": upper, "mean": (lower + upper) / 2}[bin_mode]
        bins = np.digitize(np.arange(self.MAX_NUM_CHANNELS), lower) - 1
        self._image = pillow_image().fromarray(values[bins].astype(np.uint8)[self.to_numpy()])
        return self

    def to_numpy(self) -> NDArray[np.uint8]:
        """The image as an array ``(H, W, C)``, or ``(H, W)`` if gray."""
        return np.array(self._image, dtype=np.uint8)

    def to_tensor(self) -> torch.Tensor:
        """The image as a uint8 tensor ``(C, H, W)``, or ``(H, W)`` if gray."""
        tensor = torch.from_numpy(self.to_numpy())
        return tensor.permute(2, 0, 1) if self._color_space is ColorSpace.RGB else tensor

    def to_image(self) -> PILImage:
        """The Pillow image."""
        return self._image

    def to_jpeg_buffer(self, quality: int = 95, keep_rgb: bool = False) -> FileStream:
        """The image as a JPEG file.

        Args:
            quality: From 0, the smallest file, to 95, the best image.
            keep_rgb: Store red, green and blue rather than brightness and color (YCbCr).

        Raises:
            ValueError: Another quality.
        """
        if not 0 <= quality <= 95:
            raise ValueError(f"quality: expected 0 to 95, got {quality}")
        buffer = BytesIO()
        self._image.save(buffer, "JPEG", quality=quality, keep_rgb=keep_rgb)
        return FileStream(buffer)


def _read_image(path: str | Path, color_space: ColorSpace) -> PILImage:
    pillow = pillow_image()
    try:
        with pillow.open(path) as image:
            return image.convert(color_space.value)
    except OSError as error:
        if error.errno is not None:  # the system's own errors name the file
            raise
        raise type(error)(f"image: {str(path)!r} cannot be read: {error}") from error
    # What Pillow raises for damaged files depends on where the damage is.
    except (SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise OSError(f"image: {str(path)!r} cannot be read: {error}") from error


def _image_of_array(image: NDArray[Any]) -> PILImage:
    if image.dtype != np.uint8:
        raise ValueError(f"image: expected dtype uint8, got {image.dtype}")
    try:
        if image.ndim in (2, 3):
            return pillow_image().fromarray(image)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"image: no image has the shape {image.shape}")
