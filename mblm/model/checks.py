"""Checks of a model's inputs; each refuses bad input by name before anything runs."""

import math
from collections.abc import Sequence

from torch import Tensor

from mblm.model.config import MBLMReturnType
from mblm.utils.checks import kind_of


def check_config(name: str, config: object, kind: type) -> None:
    """Refuse what is no configuration, such as the fields of one."""
    if not isinstance(config, kind):
        given = type(config).__name__
        raise TypeError(f"{name}: expected an mblm.{kind.__name__}, got {given}")


def check_hierarchy_shape(
    name: str, shape: Sequence[int], seq_lens: Sequence[int], *, fixed_first: bool
) -> None:
    """Refuse a shape that is neither ``(B, L)`` nor nested ``(B, P_1', P_2, .., P_N)``."""
    shape, inner = tuple(shape), tuple(seq_lens[1:])
    nested = ", ".join(("B", "P_1'", *map(str, inner)))
    if len(shape) not in (2, len(seq_lens) + 1):
        raise ValueError(f"{name}: expected shape (B, L) or ({nested}), got {shape}")
    if shape[0] == 0:
        raise ValueError(f"{name}: the batch is empty, got shape {shape}")
    patch_size, is_flat = math.prod(inner), len(shape) == 2
    if not is_flat and shape[2:] != inner:
        raise ValueError(f"{name}: expected nested shape ({nested}), got {shape}")
    first = -(-shape[1] // patch_size) if is_flat else shape[1]
    if fixed_first and first > seq_lens[0]:
        # Only here: torch.compile makes a constant of a length that is put into a text.
        length = f"{shape[1]} {'bytes' if is_flat else 'patches'}"
        raise ValueError(
            f"{name}: {length} exceed the context of {seq_lens[0] * patch_size} bytes "
            f"({seq_lens[0]} patches of {patch_size}), which fixed positions of stage 1 limit"
        )


def check_inputs(input_ids: object, inputs_embeds: object, return_type: object) -> None:
    """Refuse both inputs, neither, or something else than hidden states of embeddings."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    MBLMReturnType.check(return_type)
    if inputs_embeds is not None and return_type != MBLMReturnType.HIDDEN_STATE:
        raise ValueError(f"return_type: inputs_embeds gives HIDDEN_STATE only, got {return_type!r}")


def check_like_ids(name: str, tensor: Tensor | None, ids: Tensor) -> None:
    """Refuse a mask or labels whose shape or device is not that of the token ids."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(tensor)}")
    if tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
    if tensor.shape != ids.shape:
        raise ValueError(
            f"{name}: expected the shape of input_ids {tuple(ids.shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.device != ids.device:
        raise ValueError(
            f"{name}: expected the device of input_ids, {ids.device}, got {tensor.device}"
        )


def check_embeddings(
    embeddings: Tensor | Sequence[Tensor],
    hidden_dims: Sequence[int],
    seq_lens: Sequence[int],
    *,
    fixed_first: bool,
) -> None:
    """Refuse ``inputs_embeds`` that is neither nested embeddings of bytes nor one per stage."""
    stages = len(seq_lens)
    if isinstance(embeddings, Tensor):
        given = {"inputs_embeds": (embeddings, stages, hidden_dims[-1])}
    else:
        if len(embeddings) != stages:
            raise ValueError(
                f"inputs_embeds: expected {stages} tensors, one per stage, got {len(embeddings)}"
            )
        given = {
            f"inputs_embeds[{index}]": (tensor, stages - index, hidden_dims[stages - 1 - index])
            for index, tensor in enumerate(embeddings)
        }
    leading = None
    for name, (tensor, depth, dim) in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {kind_of(tensor)}")
        inner = (*seq_lens[1:depth], dim)
        expected = ", ".join(("B", "P_1'", *map(str, inner)))
        if tensor.ndim != depth + 2 or tuple(tensor.shape[2:]) != inner or 0 in tensor.shape[:2]:
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")
        if leading is not None and tensor.shape[:2] != leading:
            raise ValueError(
                f"{name}: expected (B, P_1') = {tuple(leading)} as in inputs_embeds[0], "
                f"got {tuple(tensor.shape[:2])}"
            )
        leading = tensor.shape[:2]
        if fixed_first and leading[1] > seq_lens[0]:
            raise ValueError(
                f"{name}: {leading[1]} patches exceed the {seq_lens[0]} fixed positions of stage 1"
            )
