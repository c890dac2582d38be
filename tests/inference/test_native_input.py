"""What the engine is given past the checks that Python makes, also while another thread writes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from mblm.inference.native_cache import NativeCache
from mblm.inference.plan import Plan
from mblm.ops import _native
from tests.inference.caches import BLOCKS, build, fed
from tests.models import mamba

pytestmark = pytest.mark.skipif(not _native.is_loaded(), reason="compiled code is tested")

TOKENS = 19
PAUSING = Plan(max_tokens=5, pause=True)


@pytest.fixture
def cache() -> NativeCache:
    return NativeCache(build("transformer", "mamba1", num_tokens=TOKENS))


def paused(cache: NativeCache) -> int:
    """A row whose caller is to choose."""
    (row,) = fed(cache, torch.tensor([1, 2, 3]))
    cache.begin([row], [PAUSING])
    cache.run([row])
    return row


@contextmanager
def written_to(ids: Tensor) -> Iterator[None]:
    """Another thread writes ids to the tensor that there are none of, and such that there are."""
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            ids.fill_(10**8)
            ids.fill_(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_what_is_no_hierarchy(cache: NativeCache) -> None:
    row = paused(cache)
    with pytest.raises(TypeError):
        _native.library().Cache(None)
    with pytest.raises(TypeError, match="hierarchy must not be None"):
        cache._engine.logits(cache, None, [row])


def test_weights_of_another_vocabulary_are_refused(cache: NativeCache) -> None:
    (row,) = cache.add()
    fewer = NativeCache(build("transformer", "mamba1", num_tokens=TOKENS - 8))._hierarchy()
    with pytest.raises(ValueError, match="start a new session"):
        cache._engine.feed(cache, fewer, [row], [torch.tensor([TOKENS - 1] * 2)], 64)


def test_weights_of_another_context_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose fixed positions a longer row would be past."""
    monkeypatch.setitem(BLOCKS, "fixed mamba1", lambda: mamba("mamba1", pos_emb_type="fixed"))
    endless = NativeCache(build("mamba1", "mamba1", seq_lens=(3, 4)))
    limited = NativeCache(build("fixed mamba1", "mamba1", seq_lens=(3, 4)))._hierarchy()
    (row,) = endless.add()
    with pytest.raises(ValueError, match="start a new session"):
        endless._engine.feed(endless, limited, [row], [torch.ones(100, dtype=torch.long)], 64)


def test_a_mask_with_other_bytes_than_0_and_1(cache: NativeCache) -> None:
    """As NumPy's views make them: all that is not zero is true."""
    row = paused(cache)
    mask = torch.zeros(1, TOKENS, dtype=torch.uint8)
    mask[0, 7] = 2
    (ran,) = cache.choose([row], mask=mask.view(torch.bool))
    assert ran.ids.tolist() == [7]


def test_values_that_are_negated_when_they_are_read(cache: NativeCache) -> None:
    (row,) = cache.add()
    cache.feed([row], [torch._neg_view(torch.tensor([-3, -5]))])
    state = cache.state(row)
    assert state["tail"].tolist() == [3, 5]
    output = state["1.output"]
    cache.set_state(row, {**state, "1.output": torch._neg_view(-output)})
    torch.testing.assert_close(cache.state(row)["1.output"], output)


@pytest.mark.parametrize("piece", [5, "ab", None, [1, 2]])
def test_pieces_that_are_no_tensors(cache: NativeCache, piece: Any) -> None:
    (row,) = cache.add()
    with pytest.raises(TypeError, match="expected bytes or a tensor"):
        cache.feed([row], [piece])


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda ids: ids.to("meta")])
def test_pieces_without_memory_of_their_values(cache: NativeCache, change: Any) -> None:
    (row,) = cache.add()
    with pytest.raises(ValueError, match="ids must be a dense tensor on the CPU"):
        cache.feed([row], [change(torch.ones(3, dtype=torch.long))])


@pytest.mark.parametrize(("lanes", "num_tokens"), [(-1, TOKENS), (0, TOKENS), (1, 0), (1, -5)])
def test_draws_of_nothing(lanes: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        _native.library().Draws(None, lanes, num_tokens, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [(0, 2, 2), (4, 0, 2), (4, 2, 0)], ids=str)
def test_a_stage_without_channels(sizes: tuple[int, int, int]) -> None:
    dim, width, inner = sizes
    none = torch.zeros(0)
    shapes = [(width, dim), (2 * width, dim), (dim, width), (inner, dim), (dim, inner)]
    q, kv, out, expand, contract = ([torch.zeros(shape), none, none] for shape in shapes)
    norm = torch.ones(dim)
    layer = [norm, *q, *kv, *out, norm, *expand, *contract]
    with pytest.raises(ValueError, match="must have shape"):
        _native.library().Stage.transformer([norm, none, *layer], 1)


def test_bytes_that_another_thread_writes_to_while_they_are_fed(cache: NativeCache) -> None:
    ids = torch.ones(40, dtype=torch.long)
    with written_to(ids):
        for _ in range(1000):
            rows = cache.add()
            with suppress(ValueError):
                cache.feed(rows, [ids])
            cache.drop(rows)


def test_drafts_that_another_thread_writes_to_in_a_run(cache: NativeCache) -> None:
    draft = torch.ones(20, dtype=torch.long)
    plan = _native.library().Plan(30, 0.0, 1, 0.0, 0.0, None, 0, None, None, False, False, 0)
    engine, hierarchy = cache._engine, cache._hierarchy()
    with written_to(draft):
        for _ in range(1000):
            rows = fed(cache, torch.tensor([1]))
            engine.begin(rows, [plan])
            with suppress(ValueError):
                engine.run(cache, hierarchy, rows, 0.02, [draft])
            cache.drop(rows)
