"""What decoding needs of a model; `mblm.model.hierarchy.Hierarchy` provides it."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class DecodableModel(Protocol):
    """A hierarchy of stages, the most global first; see `mblm.model.hierarchy.Hierarchy`."""

    num_tokens: int
    hidden_dims: Sequence[int]
    seq_lens: Sequence[int]
    patch_sizes: Sequence[int]
    stage_models: nn.ModuleList

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def max_length(self) -> int | None: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def start_token(self, stage: int, batch_size: int) -> Tensor: ...
    def empty_logits(self, batch_size: int) -> Tensor: ...
    def embed_tokens(self, stage: int, ids: Tensor) -> Tensor: ...
    def add_positions(self, stage: int, x: Tensor, first: int | Tensor = 0) -> Tensor: ...
    def project_context(self, stage: int, attended: Tensor) -> Tensor: ...
    def compute_logits(self, hidden: Tensor) -> Tensor: ...


def check_model(model: Any) -> None:
    """Refuse what does not decode.

    Raises:
        TypeError: No `mblm.MBLM`, such as an encoder or a wrapper.
        ValueError: A model without values.
    """
    if not hasattr(model, "empty_logits"):
        raise TypeError(f"model: expected an mblm.MBLM, got {type(model).__name__}")
    if model.device.type == "meta":
        raise ValueError("model: it is on the device meta, where weights have no values")
