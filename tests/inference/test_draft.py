"""Drafts change no byte, whatever proposes them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from mblm.constrain import AllowedBytes
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache
from mblm.inference.native_cache import NativeCache
from mblm.inference.plan import Draws, Plan
from mblm.inference.session import Session
from mblm.inference.torch_cache import TorchCache
from mblm.ops import _native
from mblm.ops.packing import WEIGHT_TYPES
from tests.inference.caches import (
    CLOSE,
    PAIRS,
    MakeCache,
    build,
    fed,
    ids_of,
    on_every_engine,
    run_out,
    seeded,
)

# Long enough to repeat itself, beside prompts that do and that do not.
PROMPTS = [torch.tensor([1, 2, 3, 4, 5, 6] * 3), ids_of(11), ids_of(0), torch.tensor([7] * 9)]
WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 3, "temperature": 0.2},
    {"top_p": 0.9, "temperature": 0.7},
    {"stop": Automaton.of_strings([[3, 3], [4]], 19), "top_k": 4},
    {"allow": Automaton.of_strings([[5, 6]], 19), "top_k": 4},
]


def chosen(
    cache: Cache, wishes: Sequence[dict[str, Any]], draft: Sequence[int]
) -> tuple[list[Any], torch.Tensor]:
    """What rows choose side by side, and the logits after it."""
    rows = fed(cache, *PROMPTS[: len(wishes)])
    plans = [
        Plan(20, draws=seeded(row), log_probs=True, draft=most, **wish)
        for row, (wish, most) in enumerate(zip(wishes, draft, strict=True))
    ]
    cache.begin(rows, plans)
    ran = run_out(cache, rows)
    states = [None if plan.draws is None else plan.draws.generator.get_state() for plan in plans]
    return [*zip(ran, states, strict=True)], cache.logits(rows)


# Every kind above and below, a level alone, and a patch that is longer than any draft.
MODELS = [*((kinds, (12, 7)) for kinds in PAIRS), (("mamba2",), (70,)), (("lstm",), (70,))]
MODELS += [(("mamba1", "transformer"), (3, 40))]


@pytest.mark.parametrize(
    ("kinds", "seq_lens"), MODELS, ids=[f"{' above '.join(kinds)} {lens}" for kinds, lens in MODELS]
)
@pytest.mark.parametrize("weights", ["plain PyTorch", *WEIGHT_TYPES])
def test_plans_choose_what_they_do_without(
    kinds: tuple[str, ...], seq_lens: tuple[int, ...], weights: str
) -> None:
    m = build(*kinds, seq_lens=seq_lens)
    make, close = partial(TorchCache, m), CLOSE
    if weights != "plain PyTorch":
        if not _native.is_loaded() or "lstm" in kinds[-1]:
            pytest.skip("there is no compiled code for it")
        make, close = partial(NativeCache, m, weights), {"atol": 0.0, "rtol": 0.0}
    for first in range(0, len(WISHES), 2):
        wishes = [WISHES[(first + row) % len(WISHES)] for row in range(len(PROMPTS))]
        want, logits = chosen(make(), wishes, [0] * 4)
        got, after = chosen(make(), wishes, [24, 3, 0, 100])
        for (ran, state), (ran_plain, state_plain) in zip(got, want, strict=True):
            assert torch.equal(ran.ids, ran_plain.ids) and ran.reason == ran_plain.reason
            assert torch.equal(state, state_plain)
            torch.testing.assert_close(ran.log_probs, ran_plain.log_probs, **close)
        torch.testing.assert_close(after, logits, **close)


@on_every_engine
class TestPlans:
    @pytest.mark.parametrize("length", range(6, 14))
    def test_at_every_offset_in_a_patch(self, make: MakeCache, length: int) -> None:
        m = build("transformer", "mamba2", seq_lens=(9, 7))
        results = []
        for draft in (0, 24):
            cache = make(m)
            rows = fed(cache, torch.tensor([1, 2, 3] * 5)[:length])
            cache.begin(rows, [Plan(30, draft=draft)])
            results.append(run_out(cache, rows)[0].ids.tolist())
        assert results[0] == results[1]

    @pytest.mark.parametrize("is_default", [False, True])
    @pytest.mark.parametrize("is_given", [False, True])
    def test_of_one_generator_draw_in_the_same_order(
        self, make: MakeCache, is_given: bool, is_default: bool
    ) -> None:
        m = build("mamba1", "transformer", seq_lens=(12, 7))
        results: list[list[torch.Tensor]] = []
        for draft in (0, 24):
            cache = make(m)
            rows = fed(cache, *PROMPTS[:2])
            generator = torch.default_generator if is_default else torch.Generator()
            generator.manual_seed(4)
            draws = Draws(generator), Draws(None if is_default else generator)
            cache.begin(rows, [Plan(30, top_k=5, draws=of, draft=draft) for of in draws])
            drafts = [results[0][0], None] if is_given and results else None
            results.append([ran.ids for ran in run_out(cache, rows, drafts)])
        assert all(map(torch.equal, *results))

    def test_that_pause_propose_nothing(self, make: MakeCache) -> None:
        cache = make(build("transformer", "transformer"))
        rows = fed(cache, PROMPTS[0])
        cache.begin(rows, [Plan(3, pause=True, draft=24)])
        assert cache.run(rows)[0].reason == "logits"


def passes(m: Any, cache: TorchCache, row: int, draft: torch.Tensor | None = None) -> int:
    """How many passes of the local stage a row's next 24 bytes take."""
    embed, calls = m.embed_tokens, []
    m.embed_tokens = lambda n, ids: calls.append(n) or embed(n, ids)
    try:
        cache.begin([row], [Plan(24, draft=24 if draft is None else 0)])
        cache.run([row], 60.0, None if draft is None else [draft])
    finally:
        del m.embed_tokens
    return calls.count(1)


class TestPassesOfTheReference:
    """By a model that writes zeros."""

    PROMPT = torch.zeros(50, dtype=torch.long)

    @pytest.fixture
    def m(self) -> Any:
        m = build("transformer", "transformer", seq_lens=(40, 8))
        with torch.no_grad():
            m.to_logits.weight.zero_()
            m.to_logits.bias.copy_(torch.arange(19) == 0)
        return m

    def test_are_fewer_where_a_draft_is_right(self, m: Any) -> None:
        cache = TorchCache(m)
        (row,) = fed(cache, self.PROMPT[:48])
        zeros = torch.zeros(40, dtype=torch.long)
        assert passes(m, cache, row, zeros) == 3, "one a patch"
        cache.feed([row], [zeros[:8]])
        assert passes(m, cache, row, zeros[:9]) == 1 + 15

    def test_are_fewer_where_what_is_proposed_is_right(self, m: Any) -> None:
        cache = TorchCache(m)
        (row,) = fed(cache, self.PROMPT)
        assert passes(m, cache, row) < 10

    def test_in_16_bits_are_one_a_byte_which_rounds_as_without(self, m: Any) -> None:
        cache = TorchCache(m.bfloat16())
        (row,) = fed(cache, self.PROMPT)
        assert passes(m, cache, row) == 23  # the last of 24 bytes is not taken in
        cache = TorchCache(m.float())
        (row,) = fed(cache, self.PROMPT)
        with torch.autocast("cpu", torch.bfloat16):
            assert passes(m, cache, row) == 23

    def test_are_as_many_of_copies_and_of_loaded_rows(self, m: Any) -> None:
        cache = TorchCache(m)
        (row,) = fed(cache, self.PROMPT)
        (copy,), (loaded, stepped) = cache.copy([row]), cache.add(2)
        cache.set_state(loaded, cache.state(row))
        for token in self.PROMPT:
            cache.feed([stepped], [token[None]])
        want = passes(m, cache, row)
        assert [passes(m, cache, other) for other in (copy, loaded, stepped)] == [want] * 3


@on_every_engine
def test_a_state_without_earlier_bytes_goes_on(make: MakeCache) -> None:
    cache = make(build("transformer", "transformer", seq_lens=(4, 8)))
    row, other = cache.add(2)
    cache.feed([row], [ids_of(20)])
    state = cache.state(row)
    cache.set_state(other, {**state, "tail": state["tail"][16:]})
    for one in (row, other):
        cache.begin([one], [Plan(11, draft=24)])
    assert torch.equal(*(ran.ids for ran in run_out(cache, [row, other])))
    assert torch.equal(cache.state(row)["tail"][16:], cache.state(other)["tail"])


@pytest.mark.parametrize("local", ["transformer", "lstm"])
@pytest.mark.parametrize("length", [5, 50, 3000])
def test_sessions_keep_all_bytes(length: int, local: str, tmp_path: Any) -> None:
    m = build("mamba2", local, seq_lens=(4000, 8))
    ids = ids_of(length)
    session = Session(m).feed(ids)
    session.save(tmp_path / "session")
    other = Session.load(tmp_path / "session", m).fork()
    state = other._cache.state(other._rows[0])
    assert state["tail"].tolist() == ids.tolist()


class TestAskedFor:
    """``draft`` of generate, of sessions and of batches."""

    @pytest.fixture(params=["transformer", "lstm with a state"])
    def m(self, request: pytest.FixtureRequest) -> Any:
        return build("mamba1", request.param, seq_lens=(60, 8))

    @pytest.fixture(params=["ngram", "the same model", "another model"])
    def draft(self, request: pytest.FixtureRequest, m: Any) -> Any:
        if request.param == "ngram":
            return "ngram"
        return m if request.param == "the same model" else build("transformer", seq_lens=(70,))

    @pytest.mark.parametrize("wishes", [{}, {"filter_thres": 0.8, "seed": 3}])
    def test_gives_what_there_is_without(self, m: Any, draft: Any, wishes: dict[str, Any]) -> None:
        prompt = PROMPTS[0]
        want = m.generate(prompt, num_tokens_to_generate=70, **wishes)
        got = m.generate(prompt, num_tokens_to_generate=70, draft=draft, **wishes)
        assert torch.equal(got, want)
        plain, drafted = Session(m).feed(prompt), Session(m).feed(prompt)
        for count in (30, 1, 40):
            want = plain.generate(count, **wishes)
            assert torch.equal(drafted.generate(count, draft=draft, **wishes), want)

    def test_leaves_the_default_generator_as_it_is_without(self, m: Any, draft: Any) -> None:
        def drawn(**wishes: Any) -> list[list[int]]:
            torch.manual_seed(3)
            ids = m.generate(PROMPTS[0], num_tokens_to_generate=40, filter_thres=0.5, **wishes)
            return [ids.tolist(), torch.randint(2**40, (3,)).tolist()]

        assert drawn(draft=draft) == drawn()

    def test_of_rows_with_and_without(self, m: Any, draft: Any) -> None:
        prompts = [list(range(9)) * 2, list(range(5)) * 4]
        want = Session(m, 2).feed(prompts).generate(40, filter_thres=0.9, seed=[1, 2])
        session = Session(m, 2).feed(prompts)
        got = session.generate(40, filter_thres=0.9, seed=[1, 2], draft=[None, draft])
        assert torch.equal(got, want)

    def test_under_a_constraint_and_a_processor(self, m: Any, draft: Any) -> None:
        wishes: dict[str, Any] = {"num_tokens_to_generate": 30, "seed": 1, "filter_thres": 0.5}
        for own in (
            {"constraint": AllowedBytes([3, 4, 5])},
            {"logits_processor": lambda ids, logits: logits.roll(1)},
        ):
            want = m.generate(PROMPTS[0], **wishes, **own)
            assert torch.equal(m.generate(PROMPTS[0], draft=draft, **wishes, **own), want)

    def test_of_many_prompts(self, m: Any, draft: Any) -> None:
        want = m.generate_batch(PROMPTS, max_bytes=40, seeds=1)
        got = m.generate_batch(PROMPTS, max_bytes=40, seeds=1, draft=[draft, None] * 2)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.ids, other.ids)

    def test_of_no_use_is_not_computed(self, m: Any) -> None:
        small = build("transformer", seq_lens=(70,)).bfloat16()
        small.embed_tokens = None
        m.bfloat16().generate(PROMPTS[0], num_tokens_to_generate=4, draft=small)

    def test_a_smaller_context_ends_drafts(self, m: Any) -> None:
        small = build("fixed", seq_lens=(20,))
        assert small.max_length == 20
        want = m.generate(PROMPTS[0], num_tokens_to_generate=20)
        assert torch.equal(m.generate(PROMPTS[0], num_tokens_to_generate=20, draft=small), want)

    def test_refuses(self, m: Any) -> None:
        for draft in ("ngrams", 3, torch.nn.Linear(2, 2)):
            with pytest.raises(ValueError, match="draft: expected 'ngram', an"):
                m.generate(b"\x01", num_tokens_to_generate=2, draft=draft)
        with pytest.raises(ValueError, match="draft: expected a model of 19 tokens, got one of 12"):
            m.generate(b"\x01", draft=build("transformer", num_tokens=12))
        with pytest.raises(ValueError, match="draft: expected a number >= 0, got -1"):
            Plan(1, draft=-1)
