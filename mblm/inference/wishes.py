"""What is wished for each of many prompts: the arguments of one request after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from mblm.inference.prompt import Prompt
from mblm.inference.request import Request, request


class Wishes:
    """Prompts with arguments of `request`, each one value or a list of one per prompt.

    ``for arguments in wishes`` reads the prompts, one when it is asked for.

    Args:
        prompts: Any number of them. Those of a list can be read twice.
        seeds: As another argument. A number is drawn from torch's default generator; without a seed
            of its own, the n-th prompt has one that is n more.
        arguments: By their names.

    Raises:
        TypeError: No prompts, or one.
        ValueError: A list of values that is not as long as the prompts.
    """

    def __init__(self, prompts: Iterable[Prompt], seeds: Any, arguments: Mapping[str, Any]) -> None:
        is_one = isinstance(prompts, (str, bytes, bytearray, memoryview))
        if is_one or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 2) < 2:
            raise TypeError(f"prompts: expected a list, got {type(prompts).__name__}: [prompt]?")
        self._prompts = prompts
        self.number = len(prompts) if isinstance(prompts, Sized) else None
        self._arguments = {**arguments, "seed": seeds}
        self._lists: dict[str, Iterable[Any]] = {}
        for name, value in self._arguments.items():
            if not _is_one_per_prompt(name, value):
                continue
            if self.number is not None and len(value) != self.number:
                raise ValueError(
                    f"{_given(name)}: expected one value or a list of "
                    f"{self.number}, one for each prompt, got {len(value)}"
                )
            self._lists[name] = value
        self._first_seed = int(torch.randint(2**62, ()))

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
                    raise ValueError(f"{_given(name)}: none is left for prompts[{index}]") from None
            if arguments["seed"] is None:
                arguments["seed"] = self._first_seed + index
            yield arguments


def request_of(model: Any, index: int, arguments: Mapping[str, Any]) -> Request:
    """The request for one of many prompts, which errors name."""
    try:
        return request(model, **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"prompts[{index}]: {error}") from error


def _is_one_per_prompt(name: str, value: Any) -> bool:
    is_list = isinstance(value, (list, tuple, range))
    if name == "stop":  # of which a list of strings is one value
        return is_list and any(isinstance(item, (list, tuple)) for item in value)
    return is_list


def _given(name: str) -> str:
    """What a caller calls an argument of a request."""
    return "seeds" if name == "seed" else name
