"""Bytes, images and special tokens as tensors."""

from mblm.data.utils.bytes import Bytes, FileStream
from mblm.data.utils.image import BinMode, ColorSpace, ImagePipeline
from mblm.data.utils.misc import shift_remap_tensor, target_loss_mask
from mblm.data.utils.tokenizer import Tokenizer, TokenizerOptions

__all__ = [
    "BinMode",
    "Bytes",
    "ColorSpace",
    "FileStream",
    "ImagePipeline",
    "Tokenizer",
    "TokenizerOptions",
    "shift_remap_tensor",
    "target_loss_mask",
]
