"""Multiscale Byte Language Models: a hierarchy of causal stages that models bytes.

The names below are imported when they are first used: ``import mblm`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

if TYPE_CHECKING:
    from mblm import constrain
    from mblm.inference.generation import Generation
    from mblm.inference.prompt import to_bytes, to_text
    from mblm.inference.score import Score
    from mblm.inference.session import Session
    from mblm.model.config import MBLMEncoderModelConfig, MBLMModelConfig, MBLMReturnType
    from mblm.model.mamba import MambaBlock
    from mblm.model.mblm import MBLM, MBLMEncoder
    from mblm.model.transformer import TransformerBlock, TransformerEncoderBlock
    from mblm.ops._native import build_info

_MODULES = {
    "Generation": "inference.generation",
    "MBLM": "model.mblm",
    "MBLMEncoder": "model.mblm",
    "MBLMEncoderModelConfig": "model.config",
    "MBLMModelConfig": "model.config",
    "MBLMReturnType": "model.config",
    "MambaBlock": "model.mamba",
    "Score": "inference.score",
    "Session": "inference.session",
    "TransformerBlock": "model.transformer",
    "TransformerEncoderBlock": "model.transformer",
    "build_info": "ops._native",
    "to_bytes": "inference.prompt",
    "to_text": "inference.prompt",
}

__all__ = [
    "MBLM",
    "Generation",
    "MBLMEncoder",
    "MBLMEncoderModelConfig",
    "MBLMModelConfig",
    "MBLMReturnType",
    "MambaBlock",
    "Score",
    "Session",
    "TransformerBlock",
    "TransformerEncoderBlock",
    "__version__",
    "build_info",
    "constrain",
    "to_bytes",
    "to_text",
]


def __getattr__(name: str) -> Any:
    if name == "constrain":
        return import_module("mblm.constrain")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"mblm.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
