"""What `Session.generate` and `Session.feed` take: every wish, also one for each sequence."""

from typing import Any

import numpy as np
import pytest
import torch

from mblm import MBLM, Session
from tests.decoding import alone
from tests.inference.test_continuation import InTheEngine, words
from tests.inference.test_request import without_address
from tests.models import mamba, model, transformer
from tests.native import needs_native

PROMPTS = [b"\x01\x02\x03", b"", b"\x04\x05\x06\x07\x08"]
WISHES: dict[str, Any] = {"temperature": 2.0, "filter_thres": 0.0}


@pytest.fixture(scope="module")
def m() -> MBLM:
    torch.manual_seed(0)
    return model(transformer(), mamba(), seq_lens=[12, 4])


@pytest.fixture
def session(m: MBLM) -> Session:
    return m.session(3).feed(PROMPTS)


class TestOneForEachSequence:
    @pytest.mark.parametrize(
        "wishes",
        [
            {},
            {"temperature": [2.0, 0, 1.0]},
            {"filter_thres": [0.0, 0.5, 1.0]},
            {"top_k": [3, None, 1]},
            {"top_p": [None, 0.5, 0.9]},
            {"min_p": [0.1, 0.0, None]},
            {"temperature": (0.5, 0.7, 0.9), "top_k": [7, 8, 9]},
        ],
        ids=without_address,
    )
    def test_filters(self, m: MBLM, session: Session, wishes: dict[str, Any]) -> None:
        seeds = [5, 6, 7]
        ids = session.generate(10, seed=seeds, **{**WISHES, **wishes})
        assert ids.shape == (3, 10) and ids.dtype == torch.long
        for row, prompt in enumerate(PROMPTS):
            own = {name: values[row] for name, values in wishes.items()}
            expected = alone(m, prompt, 10, seed=seeds[row], **{**WISHES, **own})
            assert ids[row].tolist() == expected

    def test_lengths(self, m: MBLM, session: Session) -> None:
        ids = session.generate([4, 0, 7], seed=range(1, 4), **WISHES)
        assert [row.tolist() for row in ids] == [
            alone(m, prompt, count, seed=seed, **WISHES)
            for prompt, count, seed in zip(PROMPTS, (4, 0, 7), (1, 2, 3), strict=True)
        ]
        assert session.lengths == [7, 0, 12]
        assert session.generate(3).shape == (3, 3)
        assert [len(row) for row in session.generate(range(3))] == [0, 1, 2]

    def test_ends(self, m: MBLM, session: Session) -> None:
        whole = session.fork().generate(10, seed=[1, 2, 3], **WISHES).tolist()
        stop = [[bytes(whole[0][3:5])], [], [b"\x12\x12\x12", bytes(whole[2][6:8])]]
        ends = [-1, whole[1][4], None]
        ids = session.generate(10, seed=[1, 2, 3], stop=stop, end_of_gen_token_id=ends, **WISHES)
        assert [row.tolist() for row in ids] == [
            alone(m, p, 10, seed=seed, stop=s, end_of_gen_token_id=e, **WISHES)
            for p, seed, s, e in zip(PROMPTS, (1, 2, 3), stop, ends, strict=True)
        ]
        assert [len(row) for row in ids] == [5, whole[1].index(whole[1][4]) + 1, 8]

    def test_constraints_and_processors(self, m: MBLM, session: Session) -> None:
        def sevens(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            logits[7] = 100.0 + len(ids)
            return logits

        constraints = [None, InTheEngine(words(2)), None]
        ids = session.generate(4, constraint=constraints, logits_processor=[None, None, sevens])
        assert ids[0].tolist() == alone(m, PROMPTS[0], 4)
        assert ids[1].tolist() == alone(m, PROMPTS[1], 4, constraint=constraints[1])
        assert len(ids[1]) == 2 and ids[2].tolist() == [7, 7, 7, 7]

    def test_of_one_sequence(self, m: MBLM) -> None:
        ids = m.session().feed(PROMPTS[0]).generate([6], seed=[3], **WISHES)
        assert [row.tolist() for row in ids] == [alone(m, PROMPTS[0], 6, seed=3, **WISHES)]

    def test_a_seed_holds_beside_a_sequence_without_one(self, m: MBLM, session: Session) -> None:
        ids = session.generate(8, seed=[5, None, None], **WISHES)
        assert ids[0].tolist() == alone(m, PROMPTS[0], 8, seed=5, **WISHES)

    @pytest.mark.parametrize(
        ("wishes", "words"),
        [
            ({"num_tokens": [1, 2]}, "num_tokens: expected one value or a list of 3, .* got 2"),
            ({"num_tokens": 3, "seed": [1]}, "seed: expected one value or a list of 3"),
            ({"num_tokens": 3, "stop": [[b"a"]]}, "stop: expected one value or a list of 3"),
            ({"num_tokens": 3, "end_of_gen_token_id": [1]}, "end_of_gen_token_id: expected one"),
            ({"num_tokens": 44}, "num_tokens: 44 bytes after 5 exceed the context of 48"),
            ({"num_tokens": [1, 2, 46]}, "num_tokens: 46 bytes after 5 exceed the context of 48"),
            ({"num_tokens": 3, "top_p": [0.5, 2, None]}, "top_p: expected a number in"),
            (
                {"num_tokens": 3, "seed": [1, 2, 3], "generator": torch.Generator()},
                "at most one of seed and generator",
            ),
        ],
        ids=without_address,
    )
    def test_is_checked_before_anything_runs(
        self, session: Session, wishes: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            session.generate(**wishes)
        assert session.lengths == [3, 0, 5]


class TestOneForAll:
    def test_seed_means_what_manual_seed_means(self, session: Session) -> None:
        torch.manual_seed(9)
        expected = session.fork().generate(8, **WISHES)
        state = torch.get_rng_state()
        assert torch.equal(session.generate(8, seed=9, **WISHES), expected)
        assert torch.equal(torch.get_rng_state(), state), "the default generator is not touched"

    def test_a_stop_gives_a_list_also_where_it_ends_nothing(self, session: Session) -> None:
        ids = session.generate(5, stop=[b"\x12\x12\x12\x12"])
        assert isinstance(ids, list) and [len(row) for row in ids] == [5, 5, 5]

    def test_what_ends_nothing_gives_a_tensor(self, session: Session) -> None:
        assert session.generate(2, end_of_gen_token_id=-1, stop=[]).shape == (3, 2)

    def test_temperature_0_is_greedy_and_draws_as_many_numbers(self, session: Session) -> None:
        greedy, numbers = session.fork().generate(6), torch.Generator()
        other = torch.Generator()
        cold = session.generate(6, temperature=0, top_p=0.9, generator=numbers)
        assert torch.equal(cold, greedy)
        torch.empty(6, 3, 19).uniform_(generator=other)
        assert torch.equal(numbers.get_state(), other.get_state())

    def test_what_is_given_can_be_trained_on(self, m: MBLM, session: Session) -> None:
        with torch.inference_mode():
            kept = session.fork().generate(6, stop=[b"\x12\x12\x12"])
        for ids in (session.generate(6), kept[0][None]):
            m(ids).backward()

    def test_what_is_moved_to_another_device_is_the_callers_own_too(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a GPU, whose ids come from the CPU."""
        monkeypatch.setattr(session, "_device", torch.device("meta"))
        monkeypatch.setattr(session, "_is_on_cpu", False)
        with torch.inference_mode():
            moved = [session.generate(2), *session.generate(2, stop=[b"\x12"])]
        assert all(ids.is_meta and not ids.is_inference() for ids in moved)


class TestAskedAgain:
    """Numbers that ask for the same again are not checked again, but nothing else is taken so."""

    def test_gives_what_one_call_gives(self, m: MBLM) -> None:
        one, other = m.session().feed(PROMPTS[0]), m.session().feed(PROMPTS[0])
        with torch.random.fork_rng():
            torch.manual_seed(3)
            parts = [one.generate(2, **WISHES) for _ in range(3)]
            torch.manual_seed(3)
            assert torch.equal(torch.cat(parts, 1), other.generate(6, **WISHES))

    def test_each_result_is_the_callers_own(self, m: MBLM) -> None:
        session = m.session()
        first = session.generate(2)
        copy = first.clone()
        session.generate(2)
        assert torch.equal(first, copy)
        assert not first.is_inference()

    def test_equal_is_not_the_same(self, m: MBLM) -> None:
        session = m.session()
        session.generate(1)
        with pytest.raises(TypeError, match="num_tokens: expected an integer, got True"):
            session.generate(True)
        with pytest.raises(TypeError, match=r"num_tokens: expected an integer, got 1\.0"):
            session.generate(1.0)  # type: ignore[arg-type]

    def test_what_may_change_is_looked_at_again(self, m: MBLM) -> None:
        session, stop, cold = m.session(), [b"\x01"], torch.tensor(1.0)
        session.generate(1, stop=stop, temperature=cold)  # type: ignore[arg-type]
        stop.append(b"")
        with pytest.raises(ValueError, match="stop: expected byte strings or texts, none empty"):
            session.generate(1, stop=stop)
        cold.fill_(-1)
        with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
            session.generate(1, temperature=cold)  # type: ignore[arg-type]

    def test_a_context_ends_all_the_same(self) -> None:
        session = model(transformer(), seq_lens=[3]).session()
        for _ in range(3):
            session.generate(1)
        with pytest.raises(ValueError, match="exceed the context of 3 bytes"):
            session.generate(1)
        assert session.length == 3


class TestErrors:
    def test_of_a_processor_have_what_was_generated(self, m: MBLM) -> None:
        def fails(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if len(ids) == 4:
                raise RuntimeError("broken")
            return logits

        session = m.session(2).feed([b"\x01", b"\x02"])
        expected = session.fork().generate(4)
        with pytest.raises(RuntimeError, match="broken") as caught:
            session.generate(9, logits_processor=[fails, None])
        got = caught.value.ids  # type: ignore[attr-defined]
        assert got[0].tolist() == expected[0].tolist() and session.lengths[0] == 5
        assert session.lengths[1] == 1 + len(got[1])
        with pytest.raises(RuntimeError, match="broken") as caught:
            m.generate(b"\x01", logits_processor=lambda ids, own: fails(ids[1:], own))
        assert caught.value.ids.tolist() == [1, *expected[0].tolist()]  # type: ignore[attr-defined]

    @needs_native
    def test_of_a_model_that_a_processor_changes_have_what_was_generated(self) -> None:
        """No byte is chosen twice: the session goes on in PyTorch, by the next call."""
        m = model(transformer(), transformer(), seq_lens=[12, 4])
        session = m.session().feed(b"\x01")
        expected = session.fork().generate(5).tolist()[0]

        def changes(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            if len(ids) == 2:
                m.stage_models[1].register_forward_hook(lambda *_: None)
            return logits

        with pytest.raises(RuntimeError, match="a layer of the model was changed") as caught:
            session.generate(5, logits_processor=changes)
        first = caught.value.ids[0].tolist()  # type: ignore[attr-defined]
        assert len(first) in (2, 3) and session.length == 1 + len(first)
        assert first + session.generate(5 - len(first)).tolist()[0] == expected


class TestFeed:
    @pytest.mark.parametrize(
        "ids",
        [
            b"\x01\x02",
            [1, 2],
            torch.tensor([[1, 2]], dtype=torch.uint8),
            ["\x01\x02"],
            [[1, 2]],
        ],
        ids=repr,
    )
    def test_of_any_kind(self, m: MBLM, ids: Any) -> None:
        session = m.session().feed(ids)
        assert torch.equal(session.logits(), m.session().feed(torch.tensor([1, 2])).logits())

    @pytest.mark.parametrize(
        "ids", [np.array([[1, 2], [3, 4]]), ["\x01\x02", [3, 4]], ([1, 2], b"\x03\x04")], ids=repr
    )
    def test_of_several_sequences(self, m: MBLM, ids: Any) -> None:
        session = m.session(2).feed(ids)
        want = m.session(2).feed(torch.tensor([[1, 2], [3, 4]]))
        assert torch.equal(session.logits(), want.logits())

    def test_of_no_bytes(self, m: MBLM) -> None:
        assert m.session(2).feed([[], b""]).lengths == [0, 0]
        assert m.session().feed([]).feed("").lengths == [0]

    @pytest.mark.parametrize(
        ("batch_size", "ids", "words"),
        [
            (1, torch.tensor([19]), r"ids: token id 19 at position \(0,\) .* num_tokens = 19"),
            (1, [1.0], r"ids\[0\]: expected an integer, got 1.0"),
            (1, torch.zeros(2, 1).long(), r"ids: expected shape \(L,\)"),
            (1, torch.zeros(48).long(), "1 bytes and 48 more exceed the context of 48 bytes"),
            (2, [], "ids: expected"),
            (2, [3, 4], "ids: expected"),
            (2, [3], "ids: expected"),
            (2, np.zeros((3, 1), int), "ids: expected"),
            (2, [b"\1"], "ids: expected a list of 2, the session's batch, got 1"),
            (2, [b"\1", b"\xff"], r"ids\[1\]: .*255"),
            (2, [b"\1", torch.zeros(2, 1).long()], r"ids\[1\]: expected shape \(L,\), got \(2, 1"),
            (2, [torch.zeros(1), b""], r"ids\[0\]: expected integer"),
        ],
        ids=str,
    )
    def test_refuses_what_is_not_one_for_each(
        self, m: MBLM, batch_size: int, ids: Any, words: str
    ) -> None:
        session = m.session(batch_size).feed([b"\1"] * batch_size)
        before = session.logits()
        with pytest.raises((ValueError, TypeError), match=words):
            session.feed(ids)
        assert session.lengths == [1] * batch_size and torch.equal(session.logits(), before)
