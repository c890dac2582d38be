"""How a row is to be continued, and the random numbers that it draws."""

import copy
import math
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mblm.inference.automaton import Automaton
from mblm.model.sampling import COLDEST, HOTTEST
from mblm.utils.checks import check_integer, check_number

# Bytes that are proposed at a time, at most: beyond, a pass of the engine pays for each.
MOST_DRAFTED = 24


class Draws:
    """Random numbers for one or more rows, the *lanes*, that are sampled side by side.

    The n-th byte of every lane has the n-th numbers ``(lanes, V)`` that ``uniform_`` draws. They
    are drawn when the first lane needs them, and kept for the others; nothing is drawn for a byte
    that is not sampled. A lane serves one row at a time, and goes on with the next one. Numbers are
    kept for a lane until it has left a row.

    Args:
        generator: Where they come from. Default: torch's default generator of the device.
        lanes: How many rows. Default 1.
        seed: They come from a generator with this seed instead, made when it is asked for.
    """

    def __init__(
        self, generator: torch.Generator | None = None, lanes: int = 1, seed: int | None = None
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {generator!r}")
        self.generator, self.seed = generator, seed
        self._seeded: dict[torch.device, torch.Generator] = {}
        self.lanes = lanes = check_integer("lanes", lanes, 1)
        self._lock = threading.Lock()
        # Which numbers are kept first, and those from there on, each with the generator's state
        # before it: changed by one assignment or one call, so that a signal finds it whole.
        self._kept: tuple[int, list[tuple[Tensor, Tensor]]] = (0, [])
        self._next = [0] * lanes  # per lane, the first numbers that may be asked for
        self._serving: list[Lane | None] = [None] * lanes
        self._waited_for = set(range(lanes))

    def enter(self, lane: int, instead_of: "Lane | None" = None) -> "Lane":
        """Have a lane serve a row, maybe instead of another.

        Raises:
            ValueError: It serves another row, or has missed numbers that are kept no longer.
        """
        with self._lock:
            begin, first = self._next[lane], self._kept[0]
            if self._serving[lane] not in (None, instead_of):
                raise ValueError(f"lane: {lane} of these draws serves another row")
            if begin < first:
                raise ValueError(
                    f"lane: {lane} of these draws has ended after {begin} bytes, and the others "
                    f"have gone on to {first}"
                )
            before = self._serving[lane]
            entered = self._serving[lane] = Lane(self, lane, begin, before)
            return entered

    def give_back(self) -> None:
        """Give numbers that no lane has come to back to the generator."""
        with self._lock:
            first, kept = self._kept
            if unused := kept[max(self._next) - first :]:
                numbers, before = unused[0]
                self.generator_on(numbers.device).set_state(before)
                del kept[-len(unused) :]

    def generator_on(self, device: torch.device) -> torch.Generator:
        """Where they come from on a device."""
        if self.generator is not None:
            return self.generator
        if self.seed is not None:
            made = self._seeded.get(device) or torch.Generator(device).manual_seed(self.seed)
            return self._seeded.setdefault(device, made)  # of threads that come at once, one's
        is_cuda = device.type == "cuda"
        return torch.cuda.default_generators[device.index] if is_cuda else torch.default_generator

    def _forget(self) -> None:
        """Let go of numbers that no lane will ask for."""
        serving = (lane for lane, of in enumerate(self._serving) if of is not None)
        waited_for = self._waited_for.union(serving)
        begin = min((self._next[lane] for lane in waited_for), default=max(self._next))
        first, kept = self._kept
        if begin > first:
            self._kept = begin, kept[begin - first :]


class Lane:
    """A lane of some draws while it serves a row.

    Attributes:
        begin: Which numbers come first.
    """

    def __init__(self, draws: Draws, lane: int, begin: int, before: "Lane | None") -> None:
        self.draws, self.begin = draws, begin
        self._lane, self._before = lane, before

    def numbers(self, n: int, like: Tensor) -> Tensor:
        """The n-th numbers, ``(V,)``, for logits ``like (.., V)``."""
        draws = self.draws
        with draws._lock:
            first, kept = draws._kept
            while n >= first + len(kept):
                draws._forget()
                first, kept = draws._kept
                generator = draws.generator_on(like.device)
                draw = partial(Tensor.uniform_, generator=generator)
                zeros, before = like.new_zeros(draws.lanes, like.shape[-1]), generator.get_state()
                # One call draws and keeps: no signal comes between the two.
                kept.extend(zip(map(draw, [zeros]), [before], strict=True))
            return kept[n - first][0][self._lane]

    def pass_on(self, n: int) -> None:
        """Numbers before the n-th are not asked for again."""
        with self.draws._lock:
            if self.draws._serving[self._lane] is self:
                self.draws._next[self._lane] = n

    def leave(self, n: int) -> None:
        """The lane serves the row no longer, and would go on with the n-th numbers."""
        draws, lane = self.draws, self._lane
        with draws._lock:
            self._before = None
            if draws._serving[lane] is self:
                draws._next[lane] = n
                draws._serving[lane] = None
                draws._waited_for.discard(lane)
                draws._forget()

    def put_back(self) -> None:
        """As if it had not been entered."""
        with self.draws._lock:
            if self.draws._serving[self._lane] is self:
                self.draws._serving[self._lane] = self._before


@dataclass(frozen=True, eq=False)
class Plan:
    """How a row is to be continued.

    The logits of a byte go through ``allow``, then ``top_p`` if it is not 0, otherwise ``top_k``,
    then ``min_p``; of what they leave, the highest of ``logits / temperature + gumbel`` is chosen.

    Attributes:
        max_tokens: Bytes to choose at most, >= 0.
        temperature: Divides the logits, finite and >= 0; 0 takes the likeliest byte, whatever the
            filters say, and draws numbers all the same. Default 1.
        top_k: So many of the highest logits are kept, >= 1. Default 1, the likeliest byte alone.
        top_p: The fewest likeliest bytes that reach this probability are kept, in [0, 1]. Default
            0, not used.
        min_p: Bytes are kept that are at least this share as likely as the likeliest, in [0, 1].
            Default 0, not used.
        draws: Where random numbers come from. Default: one lane of the device's default generator.
        lane: Which lane of ``draws``. Default 0.
        allow: What the chosen bytes may be. Where its acceptance can be reached with the bytes
            left, it stays reachable.
        stop: Ends the row with the byte that makes it accept. It reads chosen bytes only.
        log_probs: Also return the log-probability of each chosen byte, of the model's own logits.
        pause: Leave each byte to the caller.
        draft: How many bytes may be proposed at a time, those that came after the longest earlier
            match of the row's last ones, where `Cache.run` uses drafts. Default 0, none; of more
            than 24, 24 are proposed.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    min_p: float = 0.0
    draws: Draws | None = None
    lane: int = 0
    allow: Automaton | None = None
    stop: Automaton | None = None
    log_probs: bool = False
    pause: bool = False
    draft: int = 0
    # No field: for what vocabulary and device the engine has read it, and what it has made of it.
    compiled: ClassVar[tuple[tuple[int, torch.device], Any] | None] = None

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """Temperature, top_k, top_p and min_p."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def of_lane(self, lane: int) -> "Plan":
        """The same plan for a row that another lane of ``draws``, below its lanes, serves."""
        if lane == self.lane:
            return self
        other = copy.copy(self)  # what is checked already
        object.__setattr__(other, "lane", lane)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: nothing of the engine's."""
        return {name: value for name, value in vars(self).items() if name != "compiled"}

    def __post_init__(self) -> None:
        for name, lowest in (("max_tokens", 0), ("top_k", 1), ("lane", 0), ("draft", 0)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), lowest))
        temperature = check_number("temperature", self.temperature)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
        temperature = 0.0 if temperature < COLDEST else min(temperature, HOTTEST)
        object.__setattr__(self, "temperature", temperature)
        for name in ("top_p", "min_p"):
            share = check_number(name, getattr(self, name))
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {share}")
            object.__setattr__(self, name, share)
        for name, kind in (("draws", Draws), ("allow", Automaton), ("stop", Automaton)):
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name}: expected {kind.__name__} or None, got {given!r}")
        if self.lane >= (lanes := 1 if self.draws is None else self.draws.lanes):
            raise ValueError(f"lane: expected a number below the {lanes} of draws, got {self.lane}")
        for name in ("log_probs", "pause"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")


def check_plan(name: str, plan: Plan, num_tokens: int, device: torch.device) -> None:
    """Refuse a plan that is none, or not one for a model of so many tokens on a device."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{name}: expected a Plan, got {type(plan).__name__}")
    for what, automaton in (("allow", plan.allow), ("stop", plan.stop)):
        if automaton is not None and len(automaton.classes) != num_tokens:
            raise ValueError(
                f"{name}.{what}: expected an automaton of {num_tokens} tokens, got one of "
                f"{len(automaton.classes)}"
            )
    if plan.allow is not None and plan.allow.distance[plan.allow.start] < 0:
        raise ValueError(f"{name}.allow: the automaton never accepts")
    generator = None if plan.draws is None else plan.draws.generator
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"{name}.draws: the generator is on {generator.device}, the model on {device}"
        )
