"""The decoding cache in compiled code, on a CPU or a GPU, with what Python adds to it.

Rows live in ``mblm._C.Cache``, also the states of hosted stages, which Python steps: so no signal
comes between a row and a part of it. Long pieces are taken in by the reference.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.arguments import check_choice, check_count, end_after
from mblm.inference.automaton import Automaton
from mblm.inference.cache import ChangedModelError, Ran, Row, State
from mblm.inference.hosted import Share
from mblm.inference.plan import Draws, Plan, check_plan
from mblm.inference.torch_cache import TorchCache
from mblm.inference.torch_stages import loaded_bytes
from mblm.inference.weights import weights_of
from mblm.model.stage import tensor_of
from mblm.ops import _native
from mblm.ops.packing import is_on_gpu
from mblm.utils.checks import check_integer, check_token_ids

# The engine takes in up to so many positions of a stage at a time. Beyond that, PyTorch's products
# are faster: from 20 to 60 positions on, as stage, width and type of weights have it
# (benchmarks/feed.py).
NATIVE_POSITIONS = 24

# What the engine reads of objects that never change, or that it takes over.
_automata: WeakKeyDictionary[Automaton, Any] = WeakKeyDictionary()
_draws: WeakKeyDictionary[Draws, Any] = WeakKeyDictionary()


class NativeCache:
    """A `mblm.inference.cache.Cache` of which threads in C++, or a GPU, do the work.

    Its weights are those of the model at the time of each call. What it computes does not depend
    on the rows beside a row.

    Args:
        model: An `mblm.MBLM`.
        weights: What linear layers' weights are read as: ``"float32"``, ``"bfloat16"``, ``"int8"``.
        max_rows: On a GPU, how many rows there are slots for at first. Their number doubles when
            there are more rows, and a row's last bits may change then. Default 1.

    Raises:
        ValueError: The engine cannot stand in for the model; see `mblm.inference.weights`.
    """

    def __init__(self, model: Any, weights: str = "float32", max_rows: int = 1) -> None:
        packed = weights_of(model, weights)
        if packed is None:
            raise ValueError("model: compiled code cannot stand in for its local stage")
        self._model, self._type, self._packed = model, weights, packed
        self._device = model.device  # which takes time to ask for
        library = _native.library()
        self._engine: Any = (
            library.DeviceCache(packed.hierarchy, max_rows)
            if is_on_gpu(model.local_table)
            else library.Cache(packed.hierarchy)
        )
        self._torch: TorchCache | None = None

    # -- Rows --------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[Row]:
        """See `Cache.add`."""
        rows: list[Row] = self._engine.add(min(check_integer("count", count), 1 << 60))
        return rows

    def drop(self, rows: Sequence[Row]) -> None:
        """See `Cache.drop`."""
        self._engine.drop([row for row in rows if type(row) is int and row.bit_length() < 64])

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        """See `Cache.copy`."""
        with self._lease(rows) as held:
            copies: list[Row] = self._engine.copy(held)
            return copies

    def _lease(self, rows: Sequence[Row]) -> Any:
        """Rows of a call, which no other call may use until it is over."""
        for row in rows if set(map(type, rows)) - {int} or max(rows, default=0) >> 63 else ():
            if type(row) is not int or row >> 63:
                raise ValueError(f"row {row!r}: there is no such row, or it was dropped")
        return self._engine.lease(rows)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """See `Cache.lengths`."""
        with self._lease(rows) as held:
            return [length for length, _ in self._engine.lengths(held)]

    def feed(self, rows: Sequence[Row], ids: Sequence[Tensor]) -> None:
        """See `Cache.feed`."""
        engine = self._current()
        with self._lease(rows) as held:
            check_count("ids", ids, rows)
            if not engine.feed(held, ids, NATIVE_POSITIONS):
                self._feed_with_python(held, ids)

    def _feed_with_python(self, held: Any, ids: Sequence[Tensor]) -> None:
        """Feed copies of rows, so that it is done for all rows or for none."""
        engine = self._engine
        long = set(engine.long_pieces(held, ids, NATIVE_POSITIONS))
        copies = engine.copy(held)
        try:
            for row, (copy, part) in enumerate(zip(copies, ids, strict=True)):
                with self._lease([copy]) as one:
                    if row in long:
                        self._feed_long(one, part)
                    else:
                        engine.append(one, [part])
            with self._lease(copies) as fed:
                self._take_in(fed, keep_pending=True)
                engine.exchange(held, fed)
        finally:
            self.drop(copies)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """See `Cache.logits`."""
        self._current()
        with self._lease(rows) as held:
            return self._logits(held)

    def _logits(self, held: Any) -> Tensor:
        while (logits := self._engine.logits(held)) is None:
            self._step_hosted(held)
        result: Tensor = logits.to(self._device)
        return result

    def state(self, row: Row) -> State:
        """See `Cache.state`."""
        self._current()
        with self._lease([row]) as held:
            return self._state(held)

    def state_so_far(self, row: Row) -> State:
        """See `Cache.state_so_far`."""
        with self._lease([row]) as held:
            return self._saved(held)

    def _state(self, held: Any) -> State:
        self._take_in(held)
        return self._saved(held)

    def _saved(self, held: Any) -> State:
        saved = self._engine.state(held)
        state = {"length": saved.length, "taken": saved.taken, **saved.tensors}
        for n, hosted in saved.hosted.items():
            host = self._packed.hosted[n]
            position = schedule.position(self._model.patch_sizes, n, saved.taken)
            for name, value in host.saved(hosted if position else host.start).items():
                state[f"{n}.{name}"] = value
        return state

    def set_state(self, row: Row, state: State) -> None:
        """See `Cache.set_state`."""
        self._current()
        loaded = self._loaded(state)
        with self._lease([row]) as held:
            self._engine.set_state(held, loaded)

    # -- Plans -------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> None:
        """See `Cache.begin`."""
        self._current()
        with self._lease(rows) as held:
            check_count("plans", plans, rows)
            for index, plan in enumerate(plans):
                check_plan(f"plans[{index}]", plan, self._model.num_tokens, self._device)
            self._engine.begin(held, [self._native_plan(plan) for plan in plans])

    def _native_plan(self, plan: Plan) -> Any:
        library, num_tokens = _native.library(), self._model.num_tokens
        automata: list[Any] = []
        for automaton in (plan.allow, plan.stop):
            if automaton is not None and automaton not in _automata:
                _automata[automaton] = library.Automaton(
                    automaton.classes, automaton.next, automaton.distance, automaton.start
                )
            automata.append(None if automaton is None else _automata[automaton])
        draws = None if plan.draws is None else _draws.get(plan.draws)
        if draws is None:
            draws = library.Draws(*_of(plan.draws), num_tokens, self._device)
            if plan.draws is not None:
                draws = _draws.setdefault(plan.draws, draws)
        top_k, max_tokens = min(plan.top_k, num_tokens), min(plan.max_tokens, 1 << 60)
        filters = (plan.temperature, top_k, plan.top_p, plan.min_p)
        flags = (plan.log_probs, plan.pause)
        return library.Plan(max_tokens, *filters, draws, plan.lane, *automata, *flags)

    def run(
        self,
        rows: Sequence[Row],
        seconds: float = 0.02,
        drafts: Sequence[Tensor | None] | None = None,
    ) -> list[Ran]:
        """See `Cache.run`."""
        end = end_after(seconds)
        engine = self._current()
        goes_on = False
        with self._lease(rows) as held:
            given: list[Tensor | None] = []
            if drafts is not None:
                check_count("drafts", drafts, rows)
                given = [self._checked_draft(index, draft) for index, draft in enumerate(drafts)]
            while not engine.run(held, end - time.monotonic(), given, goes_on):
                if goes_on and time.monotonic() >= end:
                    break
                self._step_hosted(held, is_for_run=True)
                goes_on = True
            return self._last(held)

    def _checked_draft(self, index: int, draft: Tensor | None) -> Tensor | None:
        if draft is None:
            return None
        ids = check_token_ids(f"drafts[{index}]", draft, self._model.num_tokens)
        if ids.ndim != 1:
            raise ValueError(f"drafts[{index}]: expected shape (n,), got {tuple(ids.shape)}")
        return ids.cpu().long()

    def last(self, rows: Sequence[Row]) -> list[Ran]:
        """See `Cache.last`."""
        with self._lease(rows) as held:
            return self._last(held)

    def _last(self, held: Any) -> list[Ran]:
        return [Ran(*ran) for ran in self._engine.last(held)]

    def choose(
        self,
        rows: Sequence[Row],
        *,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Ran]:
        """See `Cache.choose`."""
        self._current()
        with self._lease(rows) as held:
            self._engine.check_choosing(held)
            check_choice(ids, logits, mask, (len(rows), self._model.num_tokens))
            if ids is not None:
                ids = check_token_ids("ids", ids, self._model.num_tokens).cpu().long()
            logits = None if logits is None else logits.detach().cpu().float()
            mask = None if mask is None else mask.cpu()
            self._logits(held)  # what is pending comes first
            self._engine.choose(held, ids, logits, mask)
            return self._last(held)

    # -- The engine's weights ----------------------------------------------------------------------

    def _current(self) -> Any:
        """The engine, with the weights that the model has now."""
        packed = self._packed
        if not packed.holds():
            hosted = packed.hosted.keys()
            found = weights_of(self._model, self._type, hosted)
            if found is None or found.hosted.keys() != hosted:
                raise ChangedModelError(
                    "a layer of the model was changed after decoding began, so that compiled code "
                    "no longer stands in for it; start a new session"
                )
            packed = found
        # Each time: of two threads that have noticed a change, one may come late with older ones.
        self._engine.set_hierarchy(packed.hierarchy)
        self._packed = packed
        return self._engine

    # -- Hosted stages -----------------------------------------------------------------------------

    def _take_in(self, held: Any, keep_pending: bool = False) -> None:
        while not self._engine.take_in(held, keep_pending):
            self._step_hosted(held)

    @torch.inference_mode()
    def _step_hosted(self, held: Any, is_for_run: bool = False) -> None:
        """Have hosted stages take in a patch of each row that waits for it."""
        for wanted in self._engine.wanted(held, is_for_run):
            n, model, host = wanted.stage, self._model, self._packed.hosted[wanted.stage]
            positions = torch.tensor(wanted.positions, device="cpu")
            x = model.add_positions(n, model.embed_tokens(n, wanted.ids), positions)
            if wanted.contexts is not None:
                rows = torch.arange(len(x), device="cpu")
                x = x + wanted.contexts[rows, positions][:, None]
            states = [
                state if position else host.start  # where it begins anew
                for state, position in zip(wanted.states, wanted.positions, strict=True)
            ]
            y, after = host.advance(states, x)
            contexts = model.project_context(n, y[:, -1:]).flatten(1)
            self._engine.supply(held, wanted, y[:, -1].float(), contexts.float(), after)

    # -- What is saved, and long pieces ------------------------------------------------------------

    def _loaded(self, state: State) -> Any:
        """The same for the engine."""
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"state: expected a dict by names, got {type(state).__name__}")
        given = dict(state)
        length, taken, tail = loaded_bytes(given, self._model)
        tensors = {"tail": torch.tensor(tail, dtype=torch.long, device="cpu")}
        states: dict[int, Share] = {}
        shapes = self._engine.state_shapes(taken)
        for n in range(len(self._model.seq_lens) if taken else 0):
            begin = f"{n}."
            own = {k.removeprefix(begin): given.pop(k) for k in list(given) if k.startswith(begin)}
            names = [k.removeprefix(begin) for k in shapes if k.startswith(begin)]
            try:
                for name in names:
                    tensor = tensor_of(own, name, tuple(shapes[begin + name]))
                    tensors[begin + name] = tensor.detach().cpu().float()
                    own.pop(name)
                if n in self._packed.hosted:
                    positions = 1 + schedule.position(self._model.patch_sizes, n, taken)
                    states[n] = self._packed.hosted[n].loaded(own, positions)
                elif own:
                    expected = [name for name in names if name not in ("output", "context")]
                    raise ValueError(f"expected {', '.join(expected)}, got {', '.join(own)} too")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"state: stage {n}: {error}") from error
        if given:
            raise ValueError(f"state: expected no {', '.join(given)}")
        return _native.library().State(length, taken, tensors, states)

    def _feed_long(self, held: Any, ids: Tensor) -> None:
        """Have the reference take in a piece; alone, so that other rows make no difference.

        The local stage still takes in what it can by itself.
        """
        if self._torch is None:
            self._torch = TorchCache(self._model)
        (other,) = self._torch.add()
        try:
            ((length, _),) = self._engine.lengths(held)
            if length:
                self._torch.set_state(other, self._state(held))
            self._torch.feed([other], [ids])
            loaded = self._loaded(self._torch.state(other))
        finally:
            self._torch.drop([other])
        self._engine.set_state_above(held, loaded, NATIVE_POSITIONS)


def _of(draws: Draws | None) -> tuple[torch.Generator | None, int]:
    return (None, 1) if draws is None else (draws.generator, draws.lanes)
