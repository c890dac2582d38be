"""Multiscale Byte Language Models: a hierarchy of causal stages that models bytes."""

__version__ = "0.5.0"

from mblm.inference.session import Session
from mblm.model.config import MBLMEncoderModelConfig, MBLMModelConfig, MBLMReturnType
from mblm.model.mamba import MambaBlock
from mblm.model.mblm import MBLM, MBLMEncoder
from mblm.model.transformer import TransformerBlock, TransformerEncoderBlock
from mblm.ops._native import build_info

__all__ = [
    "MBLM",
    "MBLMEncoder",
    "MBLMEncoderModelConfig",
    "MBLMModelConfig",
    "MBLMReturnType",
    "MambaBlock",
    "Session",
    "TransformerBlock",
    "TransformerEncoderBlock",
    "__version__",
    "build_info",
]
