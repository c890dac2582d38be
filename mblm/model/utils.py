"""Rotary positions over a stage's full width, parameter counts, and the sampling functions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mblm.model.sampling import gumbel_sample, top_k
from mblm.utils.checks import check_sizes
from mblm.utils.modes import lasting_tensors

__all__ = ["RoPE", "count_params", "gumbel_sample", "top_k"]

ParamType = nn.Module | nn.ModuleList | nn.Parameter | nn.ParameterList


class RoPE(nn.Module):
    """Rotary positions over interleaved pairs of channels.

    Pair ``i`` of position ``s`` is rotated by ``s * base**(-2 i / dim)``.
    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, section 3.4.2.

    Args:
        dim: Width of what is rotated, even.
        max_seq_len: How many positions are expected; there may be more.
        base: Base of the geometric progression of angles. Default 10000.
    """

    theta: Tensor

    def __init__(self, dim: int, max_seq_len: int, base: int = 10_000) -> None:
        super().__init__()
        check_sizes(dim=dim, max_seq_len=max_seq_len)
        if dim % 2:
            raise ValueError(f"dim: rotary positions need an even width, got {dim}")
        self.dim = dim
        self.base = base
        self.max_seq_len = max_seq_len
        self.register_buffer("theta", frequencies(dim, base), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RoPE":
        """Move to another device; the angles stay float32 and are never without values."""
        super()._apply(fn, recurse)
        self.theta = frequencies(self.dim, self.base, self.theta.device)
        return self

    def rotation(self, first: int, count: int) -> Tensor:
        """Cosines and sines of positions ``first .. first + count - 1``: (count, dim / 2, 2)."""
        return self._rotation_of(torch.arange(first, first + count, device=self.theta.device))

    def _rotation_of(self, positions: Tensor) -> Tensor:
        angles = positions.float().unsqueeze(-1) * self.theta
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotate ``x``.

        Args:
            x: ``(B, S, heads, dim)``.
            input_pos: Position of each vector, ``(B, S)``. Default: its index.

        Returns:
            A tensor like ``x``; the rotation is computed in float32.
        """
        rotation = (
            self.rotation(0, x.shape[1]) if input_pos is None else self._rotation_of(input_pos)
        )
        return rotate_pairs(x, rotation.unsqueeze(-3))


def frequencies(width: int, base: int, device: torch.device | None = None) -> Tensor:
    """By what angle each pair of ``width`` channels turns from one position to the next."""
    with lasting_tensors():
        steps = torch.arange(0, width, 2, device=device).float() / width
        return 1.0 / base**steps


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of ``x (.., D)`` by cosines and sines ``(.., D / 2, 2)``, in float32."""
    cos, sin = rotation.unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)


def count_params(
    main_module: ParamType, *submodules: tuple[str, Iterable[ParamType]]
) -> tuple[int, dict[str, int]]:
    """Count learnable parameters.

    Args:
        main_module: A module or parameter.
        submodules: Pairs of a name and modules or parameters.

    Returns:
        The count of ``main_module``, and those of the pairs by name.
    """
    return _count([main_module]), {name: _count(modules) for name, modules in submodules}


def _count(modules: Iterable[ParamType]) -> int:
    count = 0
    for module in modules:
        if isinstance(module, nn.Parameter):
            count += module.numel()
        elif isinstance(module, nn.Module):
            count += sum(p.numel() for p in module.parameters() if p.requires_grad)
        else:
            raise TypeError(f"expected modules or parameters to count, got {module!r}")
    return count
