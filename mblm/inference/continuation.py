"""Rows that go on as planned, run by run: whatever is raised on the way, no byte is lost."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Ran, Row
from mblm.inference.plan import Draws, Plan
from mblm.inference.sampling import Sampler
from mblm.model.sampling import sampling_dtype

_NO_BYTES = torch.empty(0, dtype=torch.long, device="cpu")


class Continuation:
    """Rows that a sampler continues side by side; the b-th has the b-th numbers of every byte.

    Args:
        model: The model.
        cache: Its rows' states.
        rows: Which rows go on, B.
        num_tokens: How many bytes each chooses at most.
        sampler: Chooses them.
        stop: Ends a row with the byte that makes it accept.
        generator: What the sampler draws from.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        rows: Sequence[Row],
        num_tokens: int,
        sampler: Sampler,
        stop: Automaton | None,
        generator: torch.Generator,
    ) -> None:
        self._model, self._cache, self._rows = model, cache, list(rows)
        self._generator = generator
        self._lengths = cache.lengths(rows)
        self._chosen: list[list[torch.Tensor]] = [[] for _ in rows]
        draws = Draws(sampler.generator, len(rows))
        plan = Plan(
            num_tokens,
            temperature=sampler.temperature,
            top_k=sampler.count_kept(model.num_tokens),
            top_p=sampler.top_p or 0.0,
            draws=draws,
            stop=stop,
        )
        cache.begin(rows, [plan.of_lane(lane) for lane in range(len(rows))])
        self._numbers = self._generator.get_state()

    def runs(self) -> Iterator[list[Ran]]:
        """Run until all rows have ended; yields every 20 ms what those that ran have done.

        Raises:
            MemoryError: There is no memory for the bytes to come.
        """
        going: Sequence[int] = range(len(self._rows))
        while going:
            results = self._cache.run([self._rows[b] for b in going])
            for b, ran in zip(going, results, strict=True):
                self._chosen[b].append(ran.ids)
            yield results
            if any(ran.reason == "memory" for ran in results):
                raise MemoryError(
                    "no memory for the bytes to come; those chosen are in the session"
                )
            going = [b for b, ran in zip(going, results, strict=True) if ran.reason == "time"]

    def ids(self) -> list[torch.Tensor]:
        """The bytes chosen so far, ``(n,)`` int64 on the CPU per row."""
        return [
            parts[0] if len(parts) == 1 else torch.cat([*parts, _NO_BYTES])
            for parts in self._chosen
        ]

    def settle(self) -> list[torch.Tensor]:
        """`ids` after an exception; numbers of bytes that were not chosen are given back."""
        lengths = self._cache.lengths(self._rows)
        for b, row in enumerate(self._rows):
            missed = lengths[b] - self._lengths[b] - sum(map(len, self._chosen[b]))
            if missed:  # what a run chose before it raised, or before its results were noted
                (last,) = self._cache.last([row])
                self._chosen[b].append(last.ids[-missed:])
        ids = self.ids()
        self._generator.set_state(self._numbers)
        shape, dtype = (len(ids), self._model.num_tokens), sampling_dtype(self._model.dtype)
        for _ in range(max(map(len, ids))):
            numbers = torch.empty(shape, dtype=dtype, device=self._model.device)
            numbers.uniform_(generator=self._generator)
        return ids


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """The generator, or a device's default one.

    Raises:
        ValueError: The generator is of another device.
    """
    if generator is None:
        is_cuda = device.type == "cuda"
        return torch.cuda.default_generators[device.index] if is_cuda else torch.default_generator
    if generator.device != device:
        raise ValueError(
            f"generator: expected one of {device}, the model's device, got one of "
            f"{generator.device}"
        )
    return generator
