"""Small calls of every operator, in float64, for tests of what holds for all of them."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mblm.ops

for _module in pkgutil.iter_modules(mblm.ops.__path__, "mblm.ops."):
    importlib.import_module(_module.name)

IDS = torch.tensor([[0, 3, 1, 3], [2, 0, 4, 1]])


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Sample(NamedTuple):
    """Arguments by position; those at the indices given are differentiated."""

    arguments: tuple[Any, ...]
    differentiated: tuple[int, ...]
    results: int = 1  # that are not for the gradient alone

    def to(self, dtype: torch.dtype) -> "Sample":
        """The same where it is float64."""
        arguments = [
            a.to(dtype) if isinstance(a, Tensor) and a.dtype == torch.float64 else a
            for a in self.arguments
        ]
        return self._replace(arguments=tuple(arguments))


ANGLES = normal(4, 2)
SCAN = (normal(2, 3, 2), normal(2, 3, 2).exp(), -normal(2, 2).exp(), normal(2, 3, 2))
SSD = (normal(2, 3, 2, 2), normal(2, 3, 2).exp(), -normal(2).exp(), normal(2, 3, 2))
SAMPLES: dict[str, list[Sample]] = {
    "assemble_stage": [
        Sample(
            (normal(4), normal(5, 4), IDS, normal(5, 4), None, normal(2, 4, 4), 3), (0, 1, 3, 5)
        ),
        Sample(
            (normal(4), normal(2, 3, 4), None, None, normal(3, 2, 2), normal(2, 3, 4), -1),
            (0, 1, 5),
        ),
        Sample((normal(4), normal(2, 3, 4), None, None, None, None, -1), (0, 1)),
    ],
    "causal_conv": [
        Sample((normal(2, 3, 2), normal(2, 1, 3), normal(2), None), (0, 1, 2), 2),
        Sample((normal(2, 3, 2), normal(2, 1, 3), normal(2), normal(2, 2, 2)), (0, 1, 2, 3), 2),
        # Fewer positions than the window has.
        Sample((normal(2, 1, 2), normal(2, 1, 4), normal(2), normal(2, 3, 2)), (0, 1, 2, 3), 2),
    ],
    "embed_patches": [Sample((IDS, normal(5, 2), normal(6), normal(6), 2, 3, 4, 1e-5), (1, 2, 3))],
    "gated_rms_norm": [
        Sample((normal(2, 3), normal(3), normal(2, 3) + 1, 1e-5), (0, 1, 2)),
        Sample((normal(2, 3), normal(3), None, 1e-5), (0, 1)),
    ],
    "linear": [
        Sample((normal(2, 3), normal(4, 3), normal(4)), (0, 1, 2)),
        Sample((normal(9, 3), normal(4, 3), None), (0, 1)),  # more than few
    ],
    "selective_scan": [
        Sample((*SCAN, normal(2, 3, 2) + 1, normal(2), None, 2), (0, 1, 2, 3, 4, 5), 2),
        Sample((*SCAN, normal(2, 3, 2) + 1, normal(2), normal(2, 2, 2), 2), tuple(range(7)), 2),
    ],
    "shift_rms_norm": [
        Sample((normal(2, 3, 4), normal(4), None, True, 1e-8), (0, 1)),
        Sample((normal(2, 3, 5), normal(5), normal(2, 2), True, 1e-8), (0, 1, 2)),
        Sample((normal(2, 3, 4), normal(4), None, False, 1e-8), (0, 1)),
    ],
    "short_attention": [
        Sample(
            (normal(2, 3, 1, 4), normal(2, 4, 1, 4), normal(2, 4, 1, 4) + 1, None, None), (0, 1, 2)
        ),
        Sample(
            (
                normal(1, 3, 2, 4),
                normal(1, 4, 2, 4),
                normal(1, 4, 2, 4) + 1,
                ANGLES.cos().float(),
                ANGLES.sin().float(),
            ),
            (0, 1, 2),
        ),
    ],
    "ssd": [
        Sample((*SSD, normal(2, 3, 2) + 1, normal(2), None, 2), (0, 1, 2, 3, 4, 5), 2),
        Sample((*SSD, normal(2, 3, 2) + 1, normal(2), normal(2, 2, 2, 2), 2), tuple(range(7)), 2),
    ],
}
# Gradients by name of their operator.
GRADIENTS = {f"{name}_backward" for name in SAMPLES} - {"linear_backward"}
ALL = pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, id=f"{name}-{number}")
        for name, samples in SAMPLES.items()
        for number, sample in enumerate(samples)
    ],
)
Function = Callable[..., tuple[Tensor, ...]]


def reference_of(name: str) -> Function:
    """The operator as its reference in PyTorch computes it."""
    operator = getattr(torch.ops.mblm, name).default
    return functools.partial(operator._op_dk, torch._C.DispatchKey.CompositeExplicitAutograd)


def function_of(name: str, sample: Sample) -> tuple[Function, tuple[Tensor, ...]]:
    """The operator as a function of what is differentiated, and that."""
    operator = getattr(torch.ops.mblm, name)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        arguments = list(sample.arguments)
        for index, value in zip(sample.differentiated, given, strict=True):
            arguments[index] = value
        results = operator(*arguments)
        return results[: sample.results] if isinstance(results, tuple) else (results,)

    return function, tuple(sample.arguments[index] for index in sample.differentiated)
