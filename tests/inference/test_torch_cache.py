"""The cache in plain PyTorch: dtypes, what is called how often, and memory.

What it does is tested with that of every other engine, in `test_cache.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.inference import torch_stages
from mblm.inference.cache import ChangedModelError
from mblm.inference.plan import Draws, Plan
from mblm.inference.torch_cache import TorchCache
from mblm.model.sampling import gumbel_sample, keep_highest
from tests.inference.caches import CLOSE, build, fed, ids_of, run_out, seeded, whole_logits
from tests.models import needs_bfloat16_lstm


class Calls:
    """The shapes ``(B, S)`` that each stage model is called with."""

    def __init__(self, m: MBLM) -> None:
        self.of: list[list[tuple[int, int]]] = [[] for _ in m.stage_models]
        for shapes, stage in zip(self.of, m.stage_models, strict=True):
            stage.forward_with_state = self._counting(shapes, stage.forward_with_state)

    def _counting(self, shapes: list[Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: torch.Tensor, state: Any) -> Any:
            shapes.append(tuple(x.shape[:2]))
            return original(x, state)

        return call

    def clear(self) -> None:
        for shapes in self.of:
            shapes.clear()

    @property
    def positions(self) -> list[int]:
        return [sum(rows * count for rows, count in shapes) for shapes in self.of]


class TestCalls:
    def test_every_position_is_computed_once_and_only_when_a_byte_after_it_is_wanted(self) -> None:
        m = build("lstm with a state", "transformer", "mamba1", seq_lens=(4, 3, 2))
        calls = Calls(m)
        cache = TorchCache(m)
        assert calls.positions == [1, 1, 1]  # the start tokens, once for all patches
        rows = cache.add()
        for length in range(1, 25):
            cache.feed(rows, [ids_of(1, length)])
            outer, inner = (length - 1) // 6, (length - 1) // 2
            assert calls.positions == [1 + outer, 1 + inner - outer, 1 + length]

    def test_a_prefill_runs_the_local_stage_on_the_last_patch_alone(self) -> None:
        m = build("lstm with a state", "transformer", "mamba1", seq_lens=(4, 3, 2))
        calls = Calls(m)
        fed(TorchCache(m), ids_of(21))
        assert calls.positions == [1 + 3, 1 + 1, 1 + 1]  # bytes 0 .. 17 | 18, 19 | 20

    def test_what_rows_do_at_the_same_time_is_one_call(self) -> None:
        m = build("transformer", "mamba2", seq_lens=(8, 4))
        cache = TorchCache(m)
        rows = fed(cache, *(ids_of(n) for n in (2, 5, 7, 8)))
        calls = Calls(m)
        cache.begin(rows, [Plan(count) for count in (14, 15, 13, 12)])  # to the ends of patches
        cache.run(rows, 60.0)
        upper, local = calls.of
        assert upper == [(4, 1)] * 3, "patches of all, whatever their positions"
        assert local[:3] == [(3, 1), (2, 1), (1, 1)], "until the ends of their patches"
        assert local[3:] == [(4, 1)] * 11

    @pytest.mark.parametrize("limits", [(3, 1 << 22), (1024, 100)], ids=["positions", "values"])
    def test_long_pieces_are_taken_in_by_bounded_ones(
        self, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch_stages, "_CHUNK_POSITIONS", limits[0])
        monkeypatch.setattr(torch_stages, "_CHUNK_VALUES", limits[1])
        m = build("transformer", "mamba2", seq_lens=(40, 4))
        calls = Calls(m)
        cache = TorchCache(m)
        rows = fed(cache, ids_of(90), ids_of(47))
        assert max(count for _, count in calls.of[0]) <= 3
        for logits, length in zip(cache.logits(rows), (90, 47), strict=True):
            torch.testing.assert_close(logits, whole_logits(m, ids_of(length)), **CLOSE)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kinds", [("mamba1", "transformer"), ("transformer", "mamba2")])
    def test_other_than_float32(self, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
        m = build(*kinds).to(dtype)
        cache = TorchCache(m)
        rows = fed(cache, ids_of(9), ids_of(6))
        logits = cache.logits(rows)
        assert logits.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 0.3
        want = torch.stack([whole_logits(m, ids_of(n)) for n in (9, 6)])
        torch.testing.assert_close(logits, want, atol=tolerance, rtol=tolerance)
        cache.begin(rows, [Plan(5, top_k=9, draws=seeded()) for _ in rows])
        assert [len(ran.ids) for ran in run_out(cache, rows)] == [5, 5]
        cache.set_state(rows[0], cache.state(rows[1]))
        assert torch.equal(*cache.logits(rows))

    @pytest.mark.parametrize(
        ("dtype", "drawn"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_numbers_are_drawn_in_float32_at_least(
        self, dtype: torch.dtype, drawn: torch.dtype
    ) -> None:
        cache = TorchCache(build("mamba1", "transformer").to(dtype))
        rows = fed(cache, ids_of(5))
        logits = cache.logits(rows)
        cache.begin(rows, [Plan(1, top_k=9, draws=seeded(3))])
        generator = torch.Generator().manual_seed(3)
        uniform = torch.zeros(1, 19, dtype=drawn).uniform_(generator=generator)
        want = gumbel_sample(keep_highest(logits, 9), uniform=uniform)
        assert torch.equal(cache.run(rows)[0].ids, want)

    @pytest.mark.parametrize(
        "kinds",
        [
            ("transformer", "mamba1"),
            ("mamba2", "transformer"),
            pytest.param(("lstm", "lstm"), marks=needs_bfloat16_lstm),
        ],
    )
    def test_autocast_may_begin_and_end(self, kinds: tuple[str, ...]) -> None:
        m = build(*kinds)
        ids = ids_of(13)

        def autocast() -> Any:
            return torch.autocast("cpu", dtype=torch.bfloat16)

        with autocast():
            cache = TorchCache(m)
            rows = fed(cache, ids[:9], ids[:3])
        cache.feed(rows, [ids[9:10], ids[3:8]])
        with autocast():
            cache.feed(rows, [ids[10:12], ids[8:10]])
            assert all(
                state.dtype == torch.float32
                for name, state in cache.state(rows[0]).items()
                if name.endswith(("output", "context"))
            )
        cache.feed(rows, [ids[12:], ids[10:]])
        for logits in cache.logits(rows):
            torch.testing.assert_close(logits, whole_logits(m, ids), atol=0.5, rtol=0.1)
        cache.begin(rows, [Plan(5), Plan(5)])
        assert [len(ran.ids) for ran in run_out(cache, rows)] == [5, 5]


@pytest.mark.parametrize("kind", ["transformer", "fixed"], ids=["rope", "fixed"])
def test_positions_that_are_a_module_to_call(kind: str) -> None:
    """Rows at different positions of it, too."""
    m = build(kind, kind)
    seen: list[int] = []
    for positions in m.pos_embs:
        positions.register_forward_hook(lambda *_: seen.append(1))
    cache = TorchCache(m)
    rows = fed(cache, ids_of(3), ids_of(10))
    cache.begin(rows, [Plan(9), Plan(9)])
    ran, logits = run_out(cache, rows), cache.logits(rows)
    for row, length in enumerate((3, 10)):
        whole = whole_logits(m, torch.cat((ids_of(length), ran[row].ids)))
        torch.testing.assert_close(logits[row], whole, **CLOSE)
    assert seen


def test_a_generator_of_another_device_is_refused_before_anything_runs() -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    cache = TorchCache(build("mamba1", "transformer"))
    rows = fed(cache, ids_of(3))
    with pytest.raises(ValueError, match=r"plans\[0\].draws: the generator is on cuda, the model"):
        cache.begin(rows, [Plan(1, draws=Draws(Elsewhere()))])


def test_a_copy_shares_what_the_row_has() -> None:
    cache = TorchCache(build("transformer", "mamba1", seq_lens=(500, 4)))
    rows = fed(cache, ids_of(1500))
    copied = cache.copy(rows)
    own, other = (cache._slots[row].now.bytes for row in (*rows, *copied))
    assert own is other


class TestTails:
    """The bytes that rows keep."""

    def test_grow_without_being_copied(self) -> None:
        cache = TorchCache(build("mamba1"))
        (row,) = fed(cache, ids_of(1000))
        places = set()
        for token in ids_of(200):
            cache.feed([row], [token[None]])
            places.add(cache._slots[row].now.bytes.tail.ids.data_ptr())
        assert len(places) == 1
        assert cache.state(row)["tail"].tolist() == [*ids_of(1000), *ids_of(200)]

    def test_of_copies_that_go_on_differently(self) -> None:
        cache = TorchCache(build("mamba1", "transformer", seq_lens=(40, 4)))
        rows = fed(cache, ids_of(7))
        rows += cache.copy(rows) + cache.copy(rows)
        for length in (1, 3, 90):
            more = [ids_of(length, seed) for seed in range(3)]
            cache.feed(rows, more)
            rows += cache.copy(rows[-1:])
            cache.drop([rows.pop(0)])
            tails = [cache.state(row)["tail"][-length:] for row in rows]
            assert all(map(torch.equal, tails, [more[1], more[2], more[2]]))


class TestChangedModels:
    def test_what_begins_after_weights_have_changed_begins_with_them(self) -> None:
        """Rows without bytes, and patches."""
        kinds = ("lstm with a state", "transformer", "mamba1")
        m, other = build(*kinds, seq_lens=(4, 3, 2)), build(*kinds, seq_lens=(4, 3, 2))
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1.1)
        cache, want = TorchCache(m), TorchCache(other)
        rows, expected = cache.add(2), want.add(2)
        cache.feed(rows[:1], [ids_of(7)])
        before = cache.logits(rows)
        m.load_state_dict(other.state_dict())
        want.set_state(expected[0], cache.state(rows[0]))
        assert not torch.equal(cache.logits(rows), before)
        for piece in (ids_of(1), ids_of(9)):
            cache.feed(rows, [piece] * 2)
            want.feed(expected, [piece] * 2)
            assert torch.equal(cache.logits(rows), want.logits(expected))

    @pytest.mark.parametrize("change", [torch.nn.Module.bfloat16, torch.nn.Module.double])
    def test_rows_of_another_dtype_move_to_another_cache(self, change: Any) -> None:
        m = build("transformer", "mamba1")
        cache = TorchCache(m)
        (row,) = cache.add()
        cache.feed([row], [ids_of(5)])
        logits = cache.logits([row])
        cache.begin([row], [Plan(1)])
        cache.run([row])  # leaves a byte pending
        change(m)
        for call in (cache.logits, cache.run, lambda rows: cache.feed(rows, [ids_of(1)])):
            with pytest.raises(ChangedModelError, match="a stage is another one"):
                call([row])
        state = cache.state_so_far(row)
        assert (state["length"], state["taken"], cache.lengths([row])) == (6, 5, [6])
        after = TorchCache(m)
        (moved,) = after.add()
        after.set_state(moved, {**state, "length": 5, "tail": state["tail"][:-1]})
        torch.testing.assert_close(after.logits([moved]).float(), logits, atol=0.1, rtol=0.1)
