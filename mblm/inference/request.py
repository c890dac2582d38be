"""One prompt and all that is wished for it, checked whole before anything runs."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from mblm.inference.automaton import Automaton
from mblm.inference.draft import MOST_DRAFTED
from mblm.inference.drafter import Drafter
from mblm.inference.guide import EndingGuide, Guide
from mblm.inference.plan import Draws, Plan
from mblm.inference.prompt import Prompt, prompt_ids, utf8
from mblm.inference.wishes import LogitsProcessor, Wishes, check_known
from mblm.model.sampling import count_kept
from mblm.utils.checks import check_integer, check_number

# What errors call an argument, where that is not its name.
Names: TypeAlias = Mapping[str, str]
_NAMES: Names = {}
_LISTS = list, tuple, range


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is to be continued.

    Attributes:
        prompt: Its token ids, ``(L,)`` int64 on the CPU.
        plan: How a row that has taken it in goes on.
        num_tokens: V of the model that it is for.
        guide: Makes the guide of a constraint that is no automaton; the plan pauses for it.
        logits_processor: Changes each byte's logits; the plan pauses for it.
        drafter: Makes what proposes bytes, if a smaller model is to and the plan does not pause.
        may_end_early: Whether something other than ``max_tokens`` or the context may end it.
        stops: Whether its row stops for the caller on the way: it pauses, or a model drafts for it.
    """

    prompt: Tensor
    plan: Plan
    num_tokens: int
    guide: Callable[[], Guide] | None = None
    logits_processor: LogitsProcessor | None = None
    drafter: Callable[[], Drafter] | None = None
    may_end_early: bool = field(init=False)
    stops: bool = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        ends = not (plan.stop is None and plan.allow is None and self.guide is None)
        object.__setattr__(self, "may_end_early", ends)
        object.__setattr__(self, "stops", plan.pause or self.drafter is not None)

    def of_lane(self, lane: int) -> "Request":
        """The same for a row that another lane of the plan's draws serves."""
        return self if lane == self.plan.lane else replace(self, plan=self.plan.of_lane(lane))


def request(
    model: Any,
    prompt: Prompt,
    *,
    draws: Draws | None = None,
    length: int = 0,
    names: Names = _NAMES,
    **wishes: Unpack[Wishes],
) -> Request:
    """Check a prompt and all wishes.

    Args:
        model: An `mblm.MBLM`.
        prompt: See `mblm.inference.prompt.prompt_ids`.
        draws: Where random numbers come from, with other rows' lanes, instead of ``seed`` and
            ``generator``.
        length: How many bytes the row has before the prompt. Default 0.
        names: What errors call the arguments, where a caller has other names for them.
        wishes: See `mblm.inference.wishes.Wishes`.

    Raises:
        TypeError, ValueError: Anything of another type or out of range, more bytes than the
            context, a constraint that nothing satisfies.
    """
    check_known("request", wishes, Wishes)
    top_k, top_p, min_p = wishes.get("top_k"), wishes.get("top_p"), wishes.get("min_p")
    seed, generator = wishes.get("seed"), wishes.get("generator")
    constraint, logits_processor = wishes.get("constraint"), wishes.get("logits_processor")
    draft, stop = wishes.get("draft"), wishes.get("stop", ())
    end_token_id = wishes.get("end_token_id")
    num_tokens = model.num_tokens
    ids = prompt_ids(names.get("prompt", "prompt"), prompt, num_tokens)
    count = _check_count(model, length, ids.shape[0], wishes.get("max_bytes"), names)
    if top_k is not None and top_p is not None:
        raise ValueError("pass at most one of top_k and top_p")
    kept = count_kept(_check_share("filter_thres", wishes.get("filter_thres", 1.0)), num_tokens)
    if not (top_k is None and top_p is None and min_p is None):
        kept = num_tokens if top_k is None else top_k
    end = None if end_token_id is None else _check_end(end_token_id, num_tokens, names)
    allow, guide = (None, None) if constraint is None else _compiled(constraint, num_tokens, end)
    if not (logits_processor is None or callable(logits_processor)):
        raise TypeError(
            f"logits_processor: expected a function, got {type(logits_processor).__name__}"
        )
    has_no_end = type(stop) is tuple and not stop and end is None
    if draws is None and not (seed is None and generator is None):
        draws = draws_of(model, seed, generator, names=names)
    most, drafter = (0, None) if draft is None else _drafting(draft, model)
    pauses = not (guide is None and logits_processor is None)
    plan = Plan(
        count,
        temperature=wishes.get("temperature", 1.0),
        top_k=kept,
        top_p=0.0 if top_p is None else _check_share("top_p", top_p, is_positive=True),
        min_p=0.0 if min_p is None else min_p,
        draws=draws,
        allow=allow,
        stop=None if has_no_end else _stop(stop, end, num_tokens),
        log_probs=wishes.get("log_probs", False),
        pause=pauses,
        draft=most,
    )
    drafter = None if pauses else drafter
    return Request(ids, plan, num_tokens, guide, logits_processor, drafter)


def requests_of_rows(
    model: Any, lengths: Sequence[int], wishes: Mapping[str, Any], names: Names = _NAMES
) -> list[Request]:
    """Check what is wished for rows of some lengths that go on side by side.

    Each wish, of which there must be ``max_bytes``, is one value or a list of one for each row. The
    n-th bytes of all have the n-th numbers ``(rows, V)`` of one generator; with a list of seeds,
    each row has its own.
    """
    own, count = dict(wishes), len(lengths)
    if own["max_bytes"] is None:
        check_integer(names.get("max_bytes", "max_bytes"), None)
    if not isinstance(own.get("seed"), _LISTS):
        own["draws"] = draws_of(model, own.pop("seed", None), own.pop("generator", None), count)
    lists = lists_of(own, count, "row", names)
    if not lists:
        one = request(model, b"", length=max(lengths), names=names, **own)
        return [one.of_lane(lane) for lane in range(count)]
    requests = []
    for row, length in enumerate(lengths):
        own |= {name: values[row] for name, values in lists.items()}
        asked = request(model, b"", length=length, names=names, **own)
        requests.append(asked.of_lane(row if own.get("draws") is not None else 0))
    return requests


def lists_of(
    wishes: Mapping[str, Any], count: int | None, of: str, names: Names
) -> dict[str, Sequence[Any]]:
    """Those of the arguments of `request` that have a value for each of so many (None: unknown).

    ``of`` is what errors call one of these.
    """
    lists: dict[str, Sequence[Any]] = {
        name: value
        for name, value in wishes.items()
        if isinstance(value, _LISTS)
        # A list of strings is one value.
        and (name != "stop" or any(isinstance(item, (list, tuple)) for item in value))
    }
    for name, values in lists.items():
        if count is not None and len(values) != count:
            raise ValueError(
                f"{names.get(name, name)}: expected one value or a list of {count}, one for each "
                f"{of}, got {len(values)}"
            )
    return lists


def draws_of(
    model: Any,
    seed: int | None,
    generator: torch.Generator | None,
    lanes: int = 1,
    names: Names = _NAMES,
) -> Draws | None:
    """Where random numbers come from; None for one lane of the device's default generator."""
    if seed is not None:
        if generator is not None:
            raise ValueError("pass at most one of seed and generator")
        name = names.get("seed", "seed")
        seed = check_integer(name, seed)
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"{name}: expected an integer in [-2**63, 2**64), got {seed}")
        generator = torch.Generator(model.device).manual_seed(seed)
    if generator is None and lanes == 1:
        return None
    draws = Draws(generator, lanes)
    if generator is not None and generator.device != model.device:
        raise ValueError(
            f"generator: expected one of {model.device}, the model's device, got one of "
            f"{generator.device}"
        )
    return draws


def _check_count(model: Any, length: int, fed: int, count: int | None, names: Names) -> int:
    """How many bytes to generate; refuses what does not fit the context."""
    limit, before = model.max_length, length + fed
    if limit is not None and before > limit:
        name = names.get("prompt", "prompt")
        raise ValueError(f"{name}: {before} bytes exceed the context of {limit} bytes")
    if count is None:
        return max(0, model.context_size - before)
    name = names.get("max_bytes", "max_bytes")
    count = check_integer(name, count)
    if count < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {count}")
    if limit is not None and before + count > limit:
        raise ValueError(
            f"{name}: {count} bytes after {'a prompt of ' if fed else ''}{before} exceed the "
            f"context of {limit} bytes, which fixed positions of stage 1 limit"
        )
    return count


def _check_share(name: str, value: Any, is_positive: bool = False) -> float:
    share = check_number(name, value)
    if not (0 <= share <= 1) or (is_positive and not share):
        interval = "(0, 1]" if is_positive else "[0, 1]"
        raise ValueError(f"{name}: expected a number in {interval}, got {share}")
    return share


def _check_end(token: Any, num_tokens: int, names: Names) -> int | None:
    """None if it is outside the vocabulary, and never comes."""
    token = check_integer(names.get("end_token_id", "end_token_id"), token)
    return token if 0 <= token < num_tokens else None


def _compiled(
    constraint: Any, num_tokens: int, end: int | None
) -> tuple[Automaton | None, Callable[[], Guide] | None]:
    """What a constraint allows, as an automaton or by a guide.

    An end that is no byte may come where the constraint accepts, whatever else may.
    """
    if isinstance(constraint, type) or not callable(getattr(constraint, "compile", None)):
        raise TypeError(f"constraint: expected one of mblm.constrain, got {constraint!r}")
    compiled = constraint.compile(num_tokens)
    if isinstance(compiled, Automaton):
        return compiled if end is None or end < 256 else _ending_by(compiled, end), None
    if not callable(compiled):
        raise TypeError(
            f"constraint: expected compile to give an Automaton or a function that makes a guide, "
            f"got {type(compiled).__name__}"
        )
    if end is None or end < 256:
        return None, compiled
    return None, lambda: EndingGuide(compiled(), end)


def _drafting(draft: Any, model: Any) -> tuple[int, Callable[[], Drafter] | None]:
    """How many bytes the plan proposes, or what makes the drafter."""
    if isinstance(draft, str) and draft == "ngram":
        return MOST_DRAFTED, None
    if not hasattr(draft, "empty_logits"):
        raise ValueError(f"draft: expected 'ngram', an mblm.MBLM or None, got {draft!r:.80}")
    if draft.num_tokens != model.num_tokens:
        raise ValueError(
            f"draft: expected a model of {model.num_tokens} tokens, got one of {draft.num_tokens}"
        )
    # A GPU's engine does not look at drafts.
    return 0, partial(Drafter, draft) if model.device.type == "cpu" else None


def _stop(stop: Any, end: int | None, num_tokens: int) -> Automaton | None:
    """Accepts where generation ends; None if nothing ends it."""
    is_one = isinstance(stop, (bytes, bytearray, memoryview, str))
    if is_one or not isinstance(stop, (Sequence, Set)):
        raise ValueError(f"stop: expected a list of byte strings or texts, got {stop!r}")
    strings: list[tuple[int, ...]] = []
    for string in stop:
        if not isinstance(string, (bytes, bytearray, str)) or not string:
            raise ValueError(f"stop: expected byte strings or texts, none empty, got {string!r}")
        strings.append(tuple(utf8("stop", string) if isinstance(string, str) else string))
    if end is not None:
        strings.append((end,))
    return _automaton_of(tuple(strings), num_tokens) if strings else None


# The same for the same, which an engine then reads once.
_ending_by = lru_cache(maxsize=64)(Automaton.ending_by)


@lru_cache(maxsize=64)
def _automaton_of(strings: Sequence[tuple[int, ...]], num_tokens: int) -> Automaton:
    """The same for the same strings, which an engine then reads once."""
    return Automaton.of_strings(strings, num_tokens)
