"""Rotary positions over a stage's full width, parameter counts, and the sampling functions."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mblm.model.sampling import gumbel_sample, top_k
from mblm.utils.checks import check_sizes
from mblm.utils.modes import is_lasting, lasting_tensors

__all__ = ["RoPE", "count_params", "gumbel_sample", "top_k"]

# One for all tables: they grow seldom, and a module that holds a lock cannot be copied.
_GROWTH = threading.Lock()

ParamType = nn.Module | nn.ModuleList | nn.Parameter | nn.ParameterList


class RoPE(nn.Module):
    """Rotary positions over interleaved pairs of channels.

    Pair ``i`` of position ``s`` is rotated by ``s * base**(-2 i / dim)``.
    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, section 3.4.2.

    Args:
        dim: Width of what is rotated, even.
        max_seq_len: Positions computed ahead; more are computed when they come.
        base: Base of the geometric progression of angles. Default 10000.
    """

    theta: torch.Tensor
    cache: torch.Tensor

    def __init__(self, dim: int, max_seq_len: int, base: int = 10_000) -> None:
        super().__init__()
        check_sizes(dim=dim, max_seq_len=max_seq_len)
        if dim % 2:
            raise ValueError(f"dim: rotary positions need an even width, got {dim}")
        self.dim = dim
        self.base = base
        self.max_seq_len = max_seq_len
        self.reset_parameters()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RoPE":
        """Move to another device; the angles stay float32 and are never without values."""
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        """Compute the angles anew."""
        device = self.theta.device if hasattr(self, "theta") else None
        with lasting_tensors():
            steps = torch.arange(0, self.dim, 2, device=device).float() / self.dim
            theta = 1.0 / self.base**steps
        self.register_buffer("theta", theta, persistent=False)
        self.build_rope_cache(self.max_seq_len)

    def build_rope_cache(self, max_seq_len: int) -> None:
        """Compute cosines and sines ``(max_seq_len, dim / 2, 2)``, always in float32."""
        with lasting_tensors():
            self._keep(self._rotations(0, max_seq_len))

    def _keep(self, cache: torch.Tensor) -> None:
        self.register_buffer("cache", cache, persistent=False)
        self.max_seq_len = len(cache)

    def _rotations(self, first: int, end: int) -> torch.Tensor:
        steps = torch.arange(first, end, device=self.theta.device).float()
        angles = torch.outer(steps, self.theta.float())
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def rotation(self, first: int, count: int) -> torch.Tensor:
        """Cosines and sines of positions ``first .. first + count - 1``: (count, dim / 2, 2)."""
        end = first + count
        if end > len(self.cache) and not torch.compiler.is_compiling():
            self._grow(end)
        if end > len(self.cache):  # in a trace or a transform, which ends
            return self._rotations(first, end)
        return self.cache[first:end]

    def _grow(self, end: int) -> None:
        with _GROWTH, lasting_tensors():
            if end > len(self.cache):  # another thread may have been here
                cache = self._rotations(0, max(end, 2 * len(self.cache)))
                if is_lasting(cache):
                    self._keep(cache)

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate ``x``.

        Args:
            x: ``(B, S, heads, dim)``.
            input_pos: Position of each vector, ``(B, S)``. Default: its index.

        Returns:
            A tensor like ``x``; the rotation is computed in float32.
        """
        if input_pos is None:
            rotation = self.rotation(0, x.shape[1])
        else:
            end = int(input_pos.max()) + 1 if input_pos.numel() else 0
            rotation = self.rotation(0, end)[input_pos]
        return rotate_pairs(x, rotation.unsqueeze(-3))


def rotate_pairs(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
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
        else:
            count += sum(p.numel() for p in module.parameters() if p.requires_grad)
    return count
