"""A model's fingerprint: tells apart models that compute other numbers."""

import hashlib
import io
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Settings that change what is kept in training, and no number.
_WITHOUT_EFFECT = {"train_checkpoint_chunks", "tile", "checkpoint_global", "offload"}
# Buffers that follow from the configuration; their last bits are the processor's.
_DERIVED = ".inv_freq"

# Per model its weights as they were, and the fingerprint.
_known: "weakref.WeakKeyDictionary[nn.Module, tuple[list[Seen], str]]" = weakref.WeakKeyDictionary()


class Seen:
    """A tensor at a time; holds no memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._of = weakref.ref(tensor)
        self._state = _memory_of(tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether it is this tensor, and nobody wrote to it since."""
        return self._of() is tensor and self._state == _memory_of(tensor)


def _memory_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where a tensor lies and how often it was written to, if it can tell."""
    if not _is_plain(tensor) or tensor.is_inference():
        return None
    return tensor.data_ptr(), tensor._version


def fingerprint(model: Any) -> str:
    """Hash of a model's configuration and of all weights, computed once for each version of them.

    Weights that are written to through ``.data`` or numpy are taken for what they were.
    """
    state = model.state_dict(keep_vars=True)
    if not all(_is_plain(value) and not value.is_inference() for value in state.values()):
        return _digest(model.config, state)  # there may be changes that leave no trace
    seen, digest = _known.get(model, ([], ""))
    if len(seen) != len(state) or not all(map(Seen.is_still, seen, state.values())):
        digest = _digest(model.config, state)
        _known[model] = [Seen(tensor) for tensor in state.values()], digest
    return digest


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
    )


def _digest(config: Any, state: Mapping[str, Any]) -> str:
    settings = config.model_dump(exclude={*_WITHOUT_EFFECT, "block"})
    blocks = [block.model_dump() for block in config.stage_blocks()]
    digest = hashlib.sha256(json.dumps([settings, blocks], default=str).encode())
    for name, value in state.items():
        if name.endswith(_DERIVED):
            continue
        digest.update(name.replace("_orig_mod.", "").encode())  # of a compiled stage
        if _is_plain(value):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy())
        else:  # of quantized layers
            torch.save(value, buffer := io.BytesIO())
            digest.update(buffer.getbuffer())
    return digest.hexdigest()
