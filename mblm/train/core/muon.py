"""Muon for the matrices of a model and AdamW for the rest, as one optimizer."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mblm.train.core.parallel import gather, shard_of, to_local

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_AT_ONCE = 1 << 26  # entries of matrices that are gathered and orthogonalized together


class Muon(AdamW):
    """Moves matrices along their orthogonalized momentum, and other parameters by AdamW.

    Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with Nesterov's
    momentum; Liu et al. 2025, https://arxiv.org/abs/2502.16982, for the scale
    ``0.2 * sqrt(max(rows, columns))``, which makes an update as large as AdamW's, so that one
    learning rate suits both. Decay is decoupled. Updates are computed in float32 on a CPU and in
    bfloat16 on a GPU. Of a sharded matrix, every worker gathers the update once.

    Args:
        params: Groups as `mblm.train.param_groups` makes them: with the option ``orthogonalize``
            the matrices, ``(rows, columns)``; without it what AdamW is for.
        lr: Learning rate. Default 1e-3.
        momentum: Muon's. Default 0.95.
        betas, eps: AdamW's. Default (0.9, 0.95) and 1e-8.
        weight_decay: Default 0.

    Raises:
        ValueError: A parameter to orthogonalize is no matrix, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected at least 0 and less than 1, got {momentum}")
        self._of_muon = {"orthogonalize": False, "momentum": momentum}
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # AdamW's alone does

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the matrices of one to orthogonalize are checked."""
        super().add_param_group({**self._of_muon, **param_group})
        group = self.param_groups[-1]
        for parameter in group["params"] if group["orthogonalize"] else ():
            if parameter.ndim != 2:
                self.param_groups.pop()
                shape = tuple(parameter.shape)
                raise ValueError(f"params: expected matrices to orthogonalize, got {shape}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)  # AdamW's looks for its entries in those of matrices
        for group in self.param_groups:
            group.update({name: v for name, v in self.defaults.items() if name not in group})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradients; returns what the closure, which is called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["orthogonalize"]:
                for matrices in _alike([p for p in group["params"] if p.grad is not None]):
                    self._step_muon(matrices, group)
        self.param_groups = [group for group in groups if not group["orthogonalize"]]
        try:
            inspect.unwrap(AdamW.step)(self)  # without hooks: those of this step are called once
        finally:
            self.param_groups = groups
        return loss

    def _step_muon(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        updates = orthogonalized(torch.stack([self._momentum(p, group) for p in matrices]))
        rate = 0.2 * math.sqrt(max(matrices[0].shape)) * group["lr"]
        for parameter, update in zip(matrices, updates, strict=True):
            local = to_local(parameter)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(shard_of(update, parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """What to orthogonalize of a matrix, whole and of the type to compute in."""
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, mean = to_local(parameter.grad), to_local(state["momentum_buffer"])  # type: ignore[arg-type]
        mean.lerp_(gradient, 1 - momentum)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        dtype = torch.bfloat16 if parameter.is_cuda else wide
        return gather(gradient.lerp(mean, momentum).to(dtype), parameter)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices ``(.., rows, columns)`` with singular values of about 1, by Newton and Schulz.

    The quintic's coefficients are Jordan's, who chose them for speed: they end between 0.7 and 1.2.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalized(matrices.mT).mT
    a, b, c = _COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    has_all_digits = x.dtype != torch.bfloat16 and torch.get_float32_matmul_precision() == "highest"
    if not has_all_digits or x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # An iteration multiplies x by a polynomial of its Gram matrix, and that by its square: for a
    # wide matrix, the small factors are multiplied first. Products in bfloat16 or TF32 have too few
    # digits for that.
    gram, identity = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    factors = factor = identity
    for _ in range(_ITERATIONS):
        gram = gram if factor is identity else factor @ gram @ factor
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        factors = factor @ factors
    return factors @ x


def _alike(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape on one device, as many as may be in memory together."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        groups[matrix.shape, matrix.device, matrix.dtype].append(matrix)
    for group in groups.values():
        count = max(1, _AT_ONCE // max(1, group[0].numel()))
        yield from (group[first : first + count] for first in range(0, len(group), count))
