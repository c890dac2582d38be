"""The cache on a GPU: rows come and go at any phase, and have the bits that they have alone.

It runs where there is a GPU, and where the kernels are compiled to be emulated on the CPU, which a
slow test of tests/packaging/test_cuda_sources.py does; that test runs test_cache.py so, too.
"""

from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.inference.automaton import Automaton
from mblm.inference.cache import State
from mblm.inference.engine import cache_for
from mblm.inference.native_cache import GPU_POSITIONS, NativeCache
from mblm.inference.plan import Draws, Plan
from mblm.inference.torch_cache import TorchCache
from mblm.ops.packing import WEIGHT_TYPES, round_weight
from tests.inference import caches
from tests.inference.caches import build, ids_of, whole_logits
from tests.native import GPU_KERNELS, IS_EMULATED, KIND

pytestmark = GPU_KERNELS

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
SEQ_LENS = {1: (40,), 2: (8, 4), 3: (12, 3, 4)}  # by the number of stages
PAIRS = [("transformer", "mamba1"), ("mamba1", "mamba2"), ("mamba2", "transformer")]


def on_device(*kinds: str, **fields: Any) -> MBLM:
    torch.manual_seed(0)
    return build(*kinds, **fields).to(KIND)


def run_out(cache: NativeCache | TorchCache, rows: list[int]) -> list[list[int]]:
    """All bytes that the rows' plans choose."""
    return [ran.ids.tolist() for ran in caches.run_out(cache, rows)]


def numbers(seed: int) -> Draws:
    return Draws(torch.Generator(KIND).manual_seed(seed))


def plan_of(row: int, ending: int | None) -> Plan:
    """Row 0 takes the likeliest bytes, row 2 may end at a byte, others sample."""
    stop = Automaton.of_strings([[ending]], 19) if row == 2 and ending is not None else None
    return Plan(9 + row, top_k=1 if row == 0 else 9, stop=stop, draws=numbers(row))


def same(state: State, other: State) -> bool:
    """Whether two rows' states have the same bits."""
    pairs = zip(state.values(), other.values(), strict=True)
    return state.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs
    )


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        *[(kinds, "float32") for kinds in PAIRS],
        (("transformer",), "int8"),
        (("transformer", "mamba1"), "bfloat16"),
        (("mamba1", "transformer", "mamba2"), "float32"),
    ],
)
@torch.inference_mode()
def test_rows_at_every_phase_have_the_bits_that_they_have_alone(
    kinds: tuple[str, ...], weights: str
) -> None:
    """One ends at a byte, one is dropped, one joins late, one waits for its caller."""
    m = on_device(*kinds, seq_lens=SEQ_LENS[len(kinds)])
    prompts = [ids_of(2 * row + row // 3, row) for row in range(5)]

    def alone(row: int, ending: int | None) -> tuple[list[int], State]:
        cache = NativeCache(m, weights, max_rows=8)
        rows = cache.add()
        cache.feed(rows, [prompts[row]])
        cache.begin(rows, [plan_of(row, ending)])
        return run_out(cache, rows)[0], cache.state(rows[0])

    ending = alone(2, None)[0][4]
    cache = NativeCache(m, weights, max_rows=8)
    rows = cache.add(4)
    cache.feed(rows, prompts[:4])
    cache.begin(rows, [plan_of(row, ending) for row in range(4)])
    chosen = [ran.ids.tolist() for ran in cache.run(rows, 0)]
    cache.drop([rows[3]])
    (fork,) = cache.copy([rows[1]])
    cache.logits([rows[1]])  # takes in its byte before the others' next one
    (late,) = cache.add()
    cache.feed([late], [prompts[4]])
    cache.begin([late], [plan_of(4, ending)])
    rows, kept = [*rows[:3], late], [0, 1, 2, 4]
    chosen[3:] = [[]]
    more = run_out(cache, rows)
    for row, handle, before, after in zip(kept, rows, chosen, more, strict=True):
        ids, state = alone(row, ending)
        assert before + after == ids
        assert same(cache.state(handle), state)
    cache.begin([fork], [Plan(3)])
    assert len(run_out(cache, [fork])[0]) == 3
    assert cache.lengths([fork]) == [len(prompts[1]) + len(chosen[1]) + 3]


@pytest.mark.parametrize("kinds", [("transformer", "mamba1"), ("mamba2", "mamba1", "transformer")])
@torch.inference_mode()
def test_bytes_that_the_local_stage_skips_make_no_difference(kinds: tuple[str, ...]) -> None:
    """Those up to the end of a patch, where they are fed at once."""
    cache = NativeCache(on_device(*kinds, seq_lens=SEQ_LENS[len(kinds)]), max_rows=2)
    rows = cache.add(2)
    for piece in ids_of(14).split([2, 7, 1, 4]):
        cache.feed(rows[:1], [piece])
        for byte in piece.split(1):
            cache.feed(rows[1:], [byte])
        assert same(*map(cache.state, rows))


@torch.inference_mode()
def test_a_state_moves_between_engines_and_slots() -> None:
    m = on_device("mamba1", "transformer", "mamba2", seq_lens=(4, 3, 2))
    device, torch_cache = NativeCache(m, max_rows=2), TorchCache(m)
    for length in (1, 2, 6, 7, 13):
        (row,), (other,) = device.add(), torch_cache.add()
        device.feed([row], [ids_of(length)])
        torch_cache.set_state(other, device.state(row))
        torch.testing.assert_close(
            torch_cache.logits([other])[0].cpu(), device.logits([row])[0].cpu(), **CLOSE
        )
        (copy,) = device.add()
        device.set_state(copy, torch_cache.state(other))
        device.begin([row, copy], [Plan(5), Plan(5)])
        first, second = run_out(device, [row, copy])
        assert first == second
        device.drop([row])  # whose slot the next one has


def generated(cache: NativeCache, length: int, count: int) -> list[int]:
    rows = cache.add()
    cache.feed(rows, [ids_of(length)])
    cache.begin(rows, [Plan(count)])
    return run_out(cache, rows)[0]


@torch.inference_mode()
def test_a_cache_goes_on_with_graphs_that_another_has_left() -> None:
    m = on_device("transformer", "transformer", seq_lens=(5, 3))
    first = NativeCache(m)
    expected = generated(first, 4, 12)
    graphs = first._engine.graphs
    assert graphs > 0
    assert NativeCache(m)._engine.graphs == 0  # they are in use
    del first
    assert NativeCache(m, max_rows=2)._engine.graphs == 0  # they are of one row
    second = NativeCache(m)
    assert generated(second, 4, 12) == expected
    assert second._engine.graphs == graphs


@pytest.mark.skipif(IS_EMULATED, reason="there is one device")
def test_a_model_that_has_moved_needs_a_new_session() -> None:
    m = on_device("transformer", "transformer", seq_lens=(5, 3))
    cache = NativeCache(m)
    rows = cache.add()
    cache.feed(rows, [ids_of(4)])
    m.to("cpu")
    with pytest.raises(ValueError, match="moved from cuda:0 to cpu"):
        cache.logits(rows)


@torch.inference_mode()
def test_a_long_piece_takes_no_more_slots() -> None:
    m = on_device("transformer", "transformer", seq_lens=(150, 3))
    cache, ids = NativeCache(m), ids_of(300)
    rows = cache.add()
    cache.feed(rows, [ids[:220]])
    cache.feed(rows, [ids[220:]])
    assert cache._engine.slots == 1
    torch.testing.assert_close(cache.logits(rows)[0].cpu(), whole_logits(m, ids).cpu(), **CLOSE)


@pytest.mark.parametrize("look", ["logits", "state"])
@torch.inference_mode()
def test_who_looks_at_a_row_changes_no_bits_of_what_it_is_fed(look: str) -> None:
    cache = NativeCache(on_device("mamba2", seq_lens=(40,)), "bfloat16", max_rows=2)
    rows = cache.add(2)
    cache.feed(rows, [ids_of(3)] * 2)
    getattr(cache, look)(rows[0] if look == "state" else rows[:1])
    cache.feed(rows, [ids_of(GPU_POSITIONS + 1)] * 2)
    assert same(*map(cache.state, rows))


@torch.inference_mode()
def test_stages_without_positions_never_grow() -> None:
    """A sequence of Mamba's has no end: graphs are not recorded anew beyond the context."""
    m = on_device("mamba1", "transformer", seq_lens=(4, 3))
    cache = NativeCache(m)
    rows = cache.add()
    cache.feed(rows, [ids_of(6)])
    cache.begin(rows, [Plan(12)])
    run_out(cache, rows)
    graphs = cache._engine.graphs
    assert graphs > 0
    cache.feed(rows, [ids_of(600)])
    cache.begin(rows, [Plan(1)])
    run_out(cache, rows)
    assert cache._engine.graphs >= graphs


@pytest.mark.parametrize("dims", [[8, 4], [12, 8]])
def test_widths_that_are_no_packs_go_through_pytorch(dims: list[int]) -> None:
    m = on_device("mamba1", "transformer", seq_lens=(5, 3), hidden_dims=dims)
    assert isinstance(cache_for(m, "float32"), TorchCache)


@torch.inference_mode()
def test_slots_grow_with_rows() -> None:
    m = on_device("transformer", "transformer", seq_lens=(5, 3))
    cache = NativeCache(m, max_rows=1)
    rows, prompts = [], [ids_of(2 + row, row) for row in range(5)]
    for prompt in prompts:
        rows += cache.add()
        cache.feed(rows[-1:], [prompt])
    for row, prompt in zip(rows, prompts, strict=True):
        torch.testing.assert_close(
            cache.logits([row])[0].cpu(), whole_logits(m, prompt).cpu(), **CLOSE
        )


@pytest.mark.parametrize("stops", [False, True], ids=["to their ends", "with stops"])
@torch.inference_mode()
def test_a_seed_means_the_bytes_that_it_means_in_pytorch(stops: bool) -> None:
    """The lanes of one generator, and rows of others: no number more is drawn."""
    m = on_device("mamba2", "transformer", seq_lens=(9, 4))
    stop = Automaton.of_strings([[4], [9, 9]], 19) if stops else None
    results = []
    for cache in (NativeCache(m, max_rows=4), TorchCache(m)):
        generators = [torch.Generator(KIND).manual_seed(seed) for seed in (1, 2)]
        shared, own = Draws(generators[0], 3), Draws(generators[1])
        rows = cache.add(4)
        cache.feed(rows, [ids_of(2 + row) for row in range(4)])
        plans = [Plan(11, top_k=9, draws=shared, lane=lane, stop=stop) for lane in range(3)]
        cache.begin(rows, [*plans, Plan(11, top_p=0.9, min_p=0.02, draws=own, stop=stop)])
        results.append((run_out(cache, rows), [g.get_state() for g in generators]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def check_weights(weights: str, rows: int, *kinds: str, **fields: Any) -> None:
    """Rows of a model are those of one whose weights are rounded."""
    m, rounded = (on_device(*kinds, seq_lens=(5, 4), **fields) for _ in range(2))
    for part in rounded.modules():
        if isinstance(part, torch.nn.Linear) and weights != "float32":
            weight, scale = round_weight(part.weight.data, weights)
            part.weight.data = weight.float() * (scale[:, None] if weights == "int8" else 1)
    cache = NativeCache(m, weights, max_rows=rows)
    handles = cache.add(rows)
    lengths = {row: 11 - index for index, row in enumerate({0, rows // 2, rows - 1})}
    prompts = [ids_of(min(length, m.context_size), row) for row, length in lengths.items()]
    chosen = [handles[row] for row in lengths]
    cache.feed(chosen, prompts)
    for logits, prompt in zip(cache.logits(chosen), prompts, strict=True):
        expected = whole_logits(rounded, prompt).cpu()
        torch.testing.assert_close(logits.cpu(), expected, **CLOSE)


# A GPU multiplies one row, up to eight, or 32 at a time, in kernels of their own.
@pytest.mark.parametrize("rows", [1, 2, 9, 64, 65], ids="{} rows".format)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@torch.inference_mode()
def test_weights_are_rounded_and_nothing_else(weights: str, rows: int) -> None:
    check_weights(weights, rows, "transformer", "mamba1")


@pytest.mark.parametrize("rows", [1, 3, 17], ids="{} rows".format)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize(
    "kinds",
    [
        ("odd transformer", "wide mamba1"),
        ("wide transformer", "odd mamba2"),
        ("odd mamba1", "wide mamba2"),
    ],
    ids=" above ".join,
)
@torch.inference_mode()
def test_sizes_that_fill_no_warp_and_more_than_one(
    kinds: tuple[str, ...], weights: str, rows: int
) -> None:
    check_weights(weights, rows, *kinds, num_layers=[2, 2])


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@torch.inference_mode()
def test_more_step_sizes_of_a_position_than_a_warp_has_lanes(weights: str) -> None:
    check_weights(weights, 2, "mamba1", hidden_dims=[528])
