"""Every engine's cache, and what a plan means: what whole forward passes give a row alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from mblm import MBLM, MBLMReturnType
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, Ran, Row
from mblm.inference.native_cache import NativeCache
from mblm.inference.plan import Draws, Plan
from mblm.inference.torch_cache import TorchCache
from mblm.inference.weights import weights_of
from mblm.ops import _native
from tests.models import LSTMBlock, mamba, model, transformer

# Makes a cache of a model. An engine that is added here is tested with all that follows.
MakeCache = Callable[[Any], Cache]
ENGINES: dict[str, MakeCache] = {"torch": TorchCache}
if _native.is_loaded():
    ENGINES["native"] = lambda m: TorchCache(m) if weights_of(m) is None else NativeCache(m)
on_every_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)

CLOSE = {"atol": 3e-5, "rtol": 1e-4}

# Stage models of every kind, by name.
BLOCKS: dict[str, Any] = {
    "transformer": lambda: transformer(pos_emb_type="rope"),
    "fixed": lambda: transformer(),
    "transformer without rotary": lambda: transformer(attn_use_rot_embs=False, pos_emb_type=None),
    "mamba1": lambda: mamba("mamba1"),
    "mamba2": lambda: mamba("mamba2"),
    "odd transformer": lambda: transformer(attn_head_dims=6, attn_num_heads=4),
    "wide transformer": lambda: transformer(attn_head_dims=96, attn_num_heads=1),
    "odd mamba1": lambda: mamba("mamba1", d_state=7, d_conv=1),
    "wide mamba1": lambda: mamba("mamba1", d_state=40, d_conv=4),
    "odd mamba2": lambda: mamba("mamba2", d_state=7, d_conv=1, headdim=16),
    "wide mamba2": lambda: mamba("mamba2", d_state=40, d_conv=4, headdim=1),
    "lstm with a state": lambda: LSTMBlock(with_hook=True),
    "lstm": lambda: LSTMBlock(pos_emb_type="rope"),
}
# Every kind above and below others.
PAIRS = [
    ("transformer", "mamba1"),
    ("mamba1", "mamba2"),
    ("mamba2", "transformer"),
    ("transformer without rotary", "transformer without rotary"),
    ("lstm with a state", "transformer"),
    ("transformer", "lstm with a state"),
    ("lstm", "mamba2"),
    ("mamba1", "lstm"),
]
with_every_pair = pytest.mark.parametrize("kinds", PAIRS, ids=" above ".join)


def build(
    *kinds: str, seq_lens: Sequence[int] = (8, 4), num_tokens: int = 19, **fields: Any
) -> MBLM:
    """A small model whose stages are of these kinds, its logits far from one another."""
    blocks = [BLOCKS[kind]() for kind in kinds]
    m = model(*blocks, seq_lens=list(seq_lens[: len(kinds)]), num_tokens=num_tokens, **fields)
    with torch.no_grad():
        m.to_logits.weight *= 8
    return m


def ids_of(length: int, seed: int = 0, num_tokens: int = 19) -> torch.Tensor:
    """Some bytes, ``(length,)``."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, num_tokens - 1, (length,), generator=generator)


@torch.inference_mode()
def whole_logits(m: MBLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(V,)`` of the byte after ``ids (L,)``, by a pass over all of them."""
    return m(ids[None].to(m.device), return_type=MBLMReturnType.LOGITS)[0, -1]


def numbers_of(seed: int, lanes: int, num_tokens: int = 19) -> Callable[[int], torch.Tensor]:
    """The n-th numbers ``(lanes, V)``: one call of ``uniform_`` per byte."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[torch.Tensor] = []

    def numbers(n: int) -> torch.Tensor:
        while len(drawn) <= n:
            drawn.append(torch.zeros(lanes, num_tokens).uniform_(generator=generator))
        return drawn[n]

    return numbers


def sampled(logits: torch.Tensor, allowed: Sequence[bool], plan: Plan, u: torch.Tensor) -> int:
    """The token that a plan chooses from logits ``(V,)`` with numbers ``(V,)``."""
    logits = logits.float().masked_fill(~torch.tensor(allowed), float("-inf"))
    if plan.temperature == 0:
        return int(logits.argmax())
    scaled = logits / plan.temperature
    order = scaled.argsort(descending=True).tolist()
    probabilities = scaled.softmax(-1)
    if plan.top_p:
        kept, total = [], 0.0
        for token in order:
            if total >= plan.top_p:
                break
            kept.append(token)
            total += float(probabilities[token])
    else:
        kept = order[: plan.top_k]
    if plan.min_p:
        least = plan.min_p * float(probabilities[order[0]])
        kept = [token for token in kept if float(probabilities[token]) >= least]
    noise = -torch.log((-torch.log(u.clamp(min=1e-20))).clamp(min=1e-20))
    return max(kept, key=lambda token: float(scaled[token] + noise[token]))


def follow(
    m: MBLM, ids: torch.Tensor, plan: Plan, numbers: Callable[[int], torch.Tensor]
) -> tuple[list[int], list[float], str]:
    """What a plan chooses after ``ids (L,)``, its log-probabilities, and why it ends.

    Whole forward passes and nothing else: this is what every cache is to do.
    """
    chosen: list[int] = []
    log_probs: list[float] = []
    allow, stop = plan.allow, plan.stop
    of_allow, of_stop = (None if a is None else a.start for a in (allow, stop))
    while True:
        room = None if m.max_length is None else m.max_length - len(ids) - len(chosen)
        left = (
            plan.max_tokens - len(chosen)
            if room is None
            else min(plan.max_tokens - len(chosen), room)
        )
        if stop is not None and chosen and stop.accepts(of_stop):
            return chosen, log_probs, "stop"
        if allow is not None and allow.accepts(of_allow) and not any(allowed_by(allow, of_allow)):
            return chosen, log_probs, "matched"
        if len(chosen) == plan.max_tokens:
            return chosen, log_probs, "length"
        if room == 0:
            return chosen, log_probs, "context"
        may_come = [True] * m.num_tokens
        if allow is not None:
            may_come = allowed_by(allow, of_allow)
            if allow.distance[of_allow] <= left:  # to be finished in time
                after = [allow.step(of_allow, token) for token in range(m.num_tokens)]
                may_come = [
                    ok and int(allow.distance[state]) < left
                    for ok, state in zip(may_come, after, strict=True)
                ]
            if not any(may_come):
                return chosen, log_probs, "matched"
        logits = whole_logits(m, torch.cat((ids, torch.tensor(chosen, dtype=torch.long))))
        token = sampled(logits, may_come, plan, numbers(len(chosen))[plan.lane])
        log_probs.append(float(logits.float().log_softmax(-1)[token]))
        chosen.append(token)
        of_allow = None if allow is None else allow.step(of_allow, token)
        of_stop = None if stop is None else stop.step(of_stop, token)


def allowed_by(automaton: Automaton, state: int) -> list[bool]:
    """Whether each token may come, however many are left."""
    return [automaton.step(state, token) >= 0 for token in range(len(automaton.classes))]


def run_out(
    cache: Cache, rows: Sequence[Row], drafts: Sequence[torch.Tensor | None] | None = None
) -> list[Ran]:
    """Run until no row goes on; what each was given in all."""
    given: list[Ran] | None = None
    while True:
        ran = cache.run(rows, 0.01, drafts)
        given = ran if given is None else [after(a, b) for a, b in zip(given, ran, strict=True)]
        drafts = None
        if all(r.reason != "time" for r in ran):
            return given


def after(first: Ran, then: Ran) -> Ran:
    """Two runs of a row in one."""
    log_probs = None
    if first.log_probs is not None and then.log_probs is not None:
        log_probs = torch.cat((first.log_probs, then.log_probs))
    return then._replace(ids=torch.cat((first.ids, then.ids)), log_probs=log_probs)


def fed(cache: Cache, *parts: torch.Tensor) -> list[Row]:
    """Rows of a cache that have these bytes."""
    rows = cache.add(len(parts))
    cache.feed(rows, list(parts))
    return rows


def seeded(seed: int = 5, lanes: int = 1) -> Draws:
    """Draws from a generator of its own."""
    return Draws(torch.Generator().manual_seed(seed), lanes)


class InterruptedInTestError(Exception):
    """What comes in the middle of a call."""


@contextmanager
def interrupted_at(m: nn.Module, call: int) -> Iterator[list[int]]:
    """Raise at this call of any stage model or of the logits' layer, counted from 1.

    What is yielded holds how many calls there were.
    """
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise InterruptedInTestError

    handles = [
        module.register_forward_pre_hook(count)
        for module in m.modules()
        if isinstance(module, (nn.Linear, nn.LSTM, nn.LayerNorm))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
