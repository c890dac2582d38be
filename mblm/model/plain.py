"""Whether a layer is what it seems, so that its parameters may be read past it.

Operators that fuse a layer with others, and compiled decoding, read ``layer.weight`` where PyTorch
would call the layer. That is the same thing only for a layer of the very class, with parameters of
its own and nobody hooked into it. Anything else (an adapter, a quantized weight, a parametrization,
a hook) is called as the module it is.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

# A module, and the class that it must be of.
Part = tuple[nn.Module, type[nn.Module]]

_PLAIN_PARAMETERS = (nn.Parameter, Tensor, type(None))
# What PyTorch's classes compute: libraries put functions of their own in its place.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (
        *(nn.Embedding, nn.Linear, nn.Conv1d, nn.LayerNorm, nn.RMSNorm),
        *(nn.GELU, nn.Dropout, nn.Identity, nn.Flatten, nn.Unflatten, nn.Sequential),
    )
}
# Of PyTorch's classes, what else they can be told to compute is left to them.
_IS_AS_USUAL: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.Embedding: lambda m: m.max_norm is None and not m.scale_grad_by_freq and not m.sparse,
    nn.LayerNorm: lambda m: m.weight is not None and m.bias is not None,
    nn.RMSNorm: lambda m: m.weight is not None and m.eps is not None,
    nn.GELU: lambda m: m.approximate == "none",
    nn.Conv1d: lambda m: (  # causal, each channel by itself
        m.groups == m.in_channels == m.out_channels
        and m.bias is not None
        and (m.stride, m.dilation, m.padding) == ((1,), (1,), (m.kernel_size[0] - 1,))
        and m.padding_mode == "zeros"
    ),
}


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else.

    So not with hooks, its own or PyTorch's for all modules, nor with another ``forward`` in the
    instance. Hooks on gradients count where there are gradients.
    """
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or (
            torch.is_grad_enabled()
            and (
                own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or torch_module._global_backward_hooks
                or torch_module._global_backward_pre_hooks
            )
        )
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module computes what ``kind`` does with parameters that can be read.

    Its children, where it has any, are modules of their own: see `are_plain`.
    """
    if type(module) is not kind or not is_bare(module):
        return False
    if kind.forward is not _FORWARDS.get(kind, kind.forward):
        return False
    for parameter in module._parameters.values():
        if type(parameter) not in _PLAIN_PARAMETERS:
            return False
    is_as_usual = _IS_AS_USUAL.get(kind)
    return is_as_usual is None or is_as_usual(module)


def are_plain(parts: Iterable[Part]) -> bool:
    """Whether all are plain; those after the first that is not are not asked for."""
    return all(is_plain(module, kind) for module, kind in parts)


def parts_in(sequence: Any, *kinds: type[nn.Module]) -> Iterator[Part]:
    """The modules of a sequence, as built; none is plain where there are more or fewer."""
    yield from zip_longest(sequence, kinds)


def keeps_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module takes the arguments of ``kind.forward``, hooked or not."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in module.__dict__
    )
