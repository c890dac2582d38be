"""Many prompts, and what is wished for each: the arguments of one request after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from mblm.inference.prompt import Prompt
from mblm.inference.request import Names, Request, lists_of, request

_NAMES: Names = {"seed": "seeds"}


class Prompts:
    """Prompts with arguments of `request`, each one value or a list of one per prompt.

    ``for arguments in prompts`` reads the prompts, one when it is asked for. Without a seed of its
    own, the n-th has one that is n more than a number drawn from torch's default generator.
    """

    def __init__(self, prompts: Iterable[Prompt], seeds: Any, arguments: Mapping[str, Any]) -> None:
        is_one = isinstance(prompts, (str, bytes, bytearray, memoryview))
        if is_one or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 2) < 2:
            kind = type(prompts).__name__
            raise TypeError(f"prompts: expected a list of prompts, got {kind}; one is [prompt]")
        self._prompts = prompts
        self.number = len(prompts) if isinstance(prompts, Sized) else None
        self._arguments = {**arguments, "seed": seeds, "names": _NAMES}
        self._lists = lists_of(self._arguments, self.number, "prompt", _NAMES)
        self._first_seed = int(torch.randint(2**62, (), device="cpu"))

    def check(self, model: Any) -> None:
        """Refuse what is wrong with a prompt of a list or what is wished for it."""
        if isinstance(self._prompts, (list, tuple)):
            for index, arguments in enumerate(self):
                request_of(model, index, arguments)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lists = {name: iter(values) for name, values in self._lists.items()}
        for index, prompt in enumerate(self._prompts):
            arguments = {**self._arguments, "prompt": prompt}
            for name, values in lists.items():
                try:
                    arguments[name] = next(values)
                except StopIteration:
                    given = _NAMES.get(name, name)
                    raise ValueError(f"{given}: none is left for prompts[{index}]") from None
            if arguments["seed"] is None:
                arguments["seed"] = self._first_seed + index
            yield arguments


def request_of(model: Any, index: int, arguments: Mapping[str, Any]) -> Request:
    """The request for one of many prompts, which errors name."""
    try:
        return request(model, **arguments)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"prompts[{index}]: {error}") from error
