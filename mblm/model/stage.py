"""What a stage model may offer, beside a causal forward pass.

A stage model is a ``torch.nn.Module`` with ``forward (B, S, D) -> (B, S, D)``. Everything else here
is optional, and is asked for with ``getattr``: a user's module needs no class of ours. A stage with
hooks on it is called, never bypassed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mblm.model.plain import Part

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Carried:
    """The states before and after the positions of a call, which it takes along.

    They are no arguments and no results of their own: what hooks see are activations. A call leaves
    ``before`` as it is, so that it may be computed again, as activation checkpointing does.

    It is no dataclass: wrappers that cast arguments would pass on a copy, and ``after`` be lost.
    """

    def __init__(self, before: Any = None) -> None:
        self.before = before  # None before the first position
        self.after: Any = None  # what the call gives


class Stage(Protocol):
    """Every ability that a stage model may have; only ``forward`` must be there.

    Decoding uses the first of `takes_carried`, `forward_with_state` and ``forward`` that it can.
    With ``forward`` alone, the inputs since the start token are kept and run again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, S, D)`` to ``(B, S, D)``; position s depends on positions up to s alone."""
        ...

    # -- Decoding ----------------------------------------------------------------------------------

    def forward_with_state(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Continue ``x (B, S, D)`` after the positions that a state has seen.

        ``state`` is None at the beginning, otherwise what an earlier call returned: a nest of
        tuples, lists and None with tensors as leaves, or an object of the stage's own with
        `state_tensors`. States are never written to.
        """
        ...

    @property
    def takes_carried(self) -> bool:
        """Whether ``forward (x, carried=Carried)`` does what `forward_with_state` does.

        So that hooks on the stage are called with it. Where a stage says no, because its layers are
        not what they were, `forward_with_state` is not used either.
        """
        ...

    def stack_states(self, states: Sequence[Any]) -> Any:
        """The state of a batch of all rows of states, which may be at different positions."""
        ...

    def split_state(self, state: Any) -> list[Any]:
        """The rows of a batch's state, each a state of a batch of one."""
        ...

    @property
    def is_recurrent(self) -> bool:
        """Whether the state does not grow with the positions, so that there may be any number.

        Then training recomputes the stage in segments of positions, too: the state is to be a nest
        of tensors, numbers and None.
        """
        ...

    def state_tensors(self, state: Any) -> dict[str, Tensor]:
        """The state of a batch of one by names, without the dimension of the batch.

        A Transformer's are ``keys`` and ``values (layers, heads, positions, head_dim)``, those of
        the start token included, and ``delayed (layers, 2, D // 2)``; a Mamba's are
        ``ssm (layers, ..)`` and ``window (layers, taps - 1, channels)``.
        """
        ...

    def state_of(self, tensors: Mapping[str, Tensor], positions: int) -> Any:
        """The state of a batch of one from what `state_tensors` gave, after so many positions.

        Raises:
            ValueError: A tensor is missing, or is of another shape or kind.
        """
        ...

    # -- Compiled decoding -------------------------------------------------------------------------

    def parts(self) -> Iterator[Part]:
        """The modules that it computes with, as built; see `mblm.model.plain.are_plain`."""
        ...

    def pack(self, weights: str, memory: Any) -> Any:
        """The stage in compiled code with weights of this type, or None; see `parts`."""
        ...

    # -- Training ----------------------------------------------------------------------------------

    @property
    def takes_shared_start(self) -> bool:
        """Whether ``forward (x, shared_start=True)`` may be told that all rows begin alike."""
        ...

    @property
    def takes_recompute_layers(self) -> bool:
        """Whether ``forward (x, recompute_layers=True)`` keeps its layers' inputs alone."""
        ...


def tensor_of(
    tensors: Mapping[str, Any], name: str, shape: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor of a state by its name, if it is what `Stage.state_tensors` gives.

    Raises:
        ValueError: It is missing, no tensor of floating point numbers, or of another shape.
    """
    tensor = has_values(name, tensors.get(name))
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected floating point numbers, got {tensor.dtype}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    return tensor


def has_values(name: str, tensor: Any) -> Tensor:
    """Refuse what is no tensor, or one that is sparse, nested or has no values (``meta``).

    Raises:
        ValueError: It is.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(
            f"{name}: expected a dense tensor with values, got {kind} on {tensor.device}"
        )
    return tensor
