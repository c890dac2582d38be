"""The decoding cache in compiled code, on a CPU or a GPU, with what Python adds to it.

Rows live in ``mblm._C.Cache``, also the states of hosted stages, which Python steps: so no signal
comes between a row and a part of it. Long pieces are taken in by the reference.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mblm.inference import schedule
from mblm.inference.arguments import check_choice, check_count, check_drafts, check_seconds
from mblm.inference.automaton import Automaton
from mblm.inference.cache import Cache, ChangedModelError, Ran, Row, State
from mblm.inference.hosted import Share, embedded
from mblm.inference.plan import MOST_DRAFTED, Draws, Plan, check_plan
from mblm.inference.torch_cache import TorchCache
from mblm.inference.torch_stages import names_stage, parts_of_state
from mblm.inference.weights import Weights, weights_of
from mblm.model.stage import tensor_of
from mblm.ops import _native
from mblm.utils.checks import check_integer, check_token_ids

# The engine takes in up to so many positions of a stage at a time. Beyond that, PyTorch's products
# are faster: from 60 to 130 positions on, as stage and type of weights have it, later in narrow
# models (benchmarks/feed.py).
NATIVE_POSITIONS = 64
# On a GPU it takes them in one at a time, some 6 us a layer, where PyTorch launches some 30 kernels
# a layer for all of them, 5 us each: predicted, not measured (docs/gpu.md).
GPU_POSITIONS = 24

# What the engine reads of objects that never change, or that it takes over.
_automata: WeakKeyDictionary[Automaton, Any] = WeakKeyDictionary()
_draws: WeakKeyDictionary[Draws, Any] = WeakKeyDictionary()

_ran = partial(tuple.__new__, Ran)  # of a tuple, without a call of Python's

_MOST = 1 << 60  # of a number that has no limit

_ENGINES_OWN = "output", "context"  # of the state of a hosted stage


class NativeCache(Cache):
    """A `Cache` of which threads in C++, or a GPU, do the work.

    Its weights are those of the model at the time of each call. What it computes does not depend
    on the rows beside a row, but for the last bits where a hosted stage stacks its states.

    Args:
        model: An `mblm.MBLM`.
        weights: What linear layers' weights are read as: ``"float32"``, ``"bfloat16"``, ``"int8"``.
        max_rows: On a GPU, how many rows there are slots for at first. Their number doubles when
            there are more rows, and a row's last bits may change then. When the cache is gone, its
            slots stay with the weights, for the next cache of as many rows. Default 1.
        packed: The model's weights of that type, where they are at hand.
    """

    def __init__(
        self,
        model: Any,
        weights: str = "float32",
        max_rows: int = 1,
        packed: Weights | None = None,
    ) -> None:
        packed = packed or weights_of(model, weights)
        if packed is None:
            raise ValueError("model: compiled code cannot stand in for its local stage")
        self._model, self._type, self._packed = model, weights, packed
        self._kind = model.num_tokens, model.device  # which takes time to ask for
        self._is_on_gpu = packed.is_on_gpu
        library = _native.library()
        self._engine: Any = (
            library.DeviceCache(packed.hierarchy, max_rows)
            if self._is_on_gpu
            else library.Cache(packed.hierarchy)
        )
        self._torch: TorchCache | None = None

    # -- Rows --------------------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[Row]:
        rows: list[Row] = self._engine.add(min(check_integer("count", count), _MOST))
        return rows

    def drop(self, rows: Sequence[Row]) -> None:
        self._engine.drop(rows)

    def copy(self, rows: Sequence[Row]) -> list[Row]:
        copies: list[Row] = self._engine.copy(rows)
        return copies

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        lengths: list[int] = self._engine.lengths(rows)
        return lengths

    def feed(self, rows: Sequence[Row], ids: Sequence[bytes | Tensor]) -> None:
        check_count("ids", ids, rows)
        most = GPU_POSITIONS if self._is_on_gpu else NATIVE_POSITIONS
        self._engine.feed(self, self._hierarchy(), rows, ids, most)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        logits: Tensor = self._engine.logits(self, self._hierarchy(), rows)
        if self._is_on_gpu:
            with torch.inference_mode(False):  # the caller's own
                logits = logits.to(self._kind[1])
        return logits

    def state(self, row: Row) -> State:
        return self._saved(self._engine.state(self, self._hierarchy(), [row]))

    def state_so_far(self, row: Row) -> State:
        return self._saved(self._engine.state_so_far([row]))

    def set_state(self, row: Row, state: State) -> None:
        hierarchy = self._hierarchy()
        self._engine.set_state(self, hierarchy, [row], self._loaded(state))

    # -- Plans -------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row], plans: Sequence[Plan]) -> list[int]:
        check_count("plans", plans, rows)
        made = list(map(self._compiled, range(len(plans)), plans))
        lengths: list[int] = self._engine.begin(rows, made)
        return lengths

    def _compiled(self, index: int, plan: Plan) -> Any:
        """What the engine makes of a plan, once for models of one vocabulary on one device."""
        if type(plan) is Plan and plan.compiled is not None and plan.compiled[0] == self._kind:
            return plan.compiled[1]
        check_plan(f"plans[{index}]", plan, *self._kind)
        library = _native.library()
        automata: list[Any] = []
        for automaton in (plan.allow, plan.stop):
            if automaton is not None and automaton not in _automata:
                _automata[automaton] = library.Automaton(
                    automaton.classes, automaton.next, automaton.distance, automaton.start
                )
            automata.append(None if automaton is None else _automata[automaton])
        draws = None if plan.draws is None else _draws.get(plan.draws)
        if plan.draws is not None and draws is None:
            draws = library.Draws(
                plan.draws.generator_on(self._kind[1]), plan.draws.lanes, *self._kind
            )
            draws = _draws.setdefault(plan.draws, draws)
        filters = (plan.temperature, min(plan.top_k, _MOST), plan.top_p, plan.min_p)
        flags = (plan.log_probs, plan.pause)
        draft = 0 if self._is_on_gpu else min(plan.draft, MOST_DRAFTED)
        count = min(plan.max_tokens, _MOST)
        made = library.Plan(count, *filters, draws, plan.lane, *automata, *flags, draft)
        object.__setattr__(plan, "compiled", (self._kind, made))
        return made

    def run(
        self,
        rows: Sequence[Row],
        seconds: float = 0.02,
        drafts: Sequence[Tensor | None] | None = None,
    ) -> list[Ran]:
        seconds = check_seconds(seconds)
        given = [] if drafts is None else check_drafts(drafts, rows, self._kind[0])
        return list(map(_ran, self._engine.run(self, self._hierarchy(), rows, seconds, given)))

    def last(self, rows: Sequence[Row]) -> list[Ran]:
        return list(map(_ran, self._engine.last(rows)))

    def choose(
        self,
        rows: Sequence[Row],
        *,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Ran]:
        check_choice(ids, logits, mask, (len(rows), self._model.num_tokens))
        if ids is not None:
            ids = check_token_ids("ids", ids, self._model.num_tokens).cpu().long()
        logits = None if logits is None else logits.detach().cpu().float()
        mask = None if mask is None else mask.cpu()
        ran = self._engine.choose(self, self._hierarchy(), rows, ids, logits, mask)
        return list(map(_ran, ran))

    # -- What the engine leaves to Python ----------------------------------------------------------

    def _hierarchy(self) -> Any:
        """The weights that the model has now."""
        packed = self._packed
        if not packed.holds():
            found = weights_of(self._model, self._type)
            if found is None or found.hosted.keys() != packed.hosted.keys():
                raise ChangedModelError(
                    "a layer of the model was changed after decoding began, so that compiled code "
                    "no longer stands in for it; start a new session"
                )
            self._packed = packed = found
        return packed.hierarchy

    @torch.inference_mode()
    def step_hosted(
        self,
        stage: int,
        ids: Tensor,
        positions: list[int],
        contexts: Tensor | None,
        states: Sequence[Share],
    ) -> tuple[Tensor, Tensor, list[Share]]:
        """Have hosted stage n take in patches ``ids (rows, R_n)``; the engine calls it.

        ``contexts (rows, P_n, D_n)`` are from the stage above; ``states`` are of use from position
        1 on. Returns the outputs ``(rows, D_n)``, the contexts that they give,
        ``(rows, P_{n+1} * D_{n+1})``, and the states after them.
        """
        model, host = self._model, self._packed.hosted[stage]
        if len(positions) > 1 and not host.stacks:  # PyTorch's bits depend on the rows of a call
            steps = [
                self.step_hosted(
                    stage,
                    ids[row : row + 1],
                    positions[row : row + 1],
                    None if contexts is None else contexts[row : row + 1],
                    states[row : row + 1],
                )
                for row in range(len(positions))
            ]
            outputs, belows, afters = zip(*steps, strict=True)
            return torch.cat(outputs), torch.cat(belows), [after for (after,) in afters]
        x = embedded(model, stage, ids, positions, None if contexts is None else list(contexts))
        before = [
            state if position else host.start  # where it begins anew
            for state, position in zip(states, positions, strict=True)
        ]
        y, after = host.advance(before, x)
        below = model.project_context(stage, y[:, -1:]).flatten(1)
        return y[:, -1].float(), below.float(), after

    def feed_long(self, before: Any, ids: Tensor) -> Any:
        """A row's state, None without bytes, after a long piece that the reference takes in.

        The engine calls it for each row by itself.
        """
        cache = self._torch or TorchCache(self._model)
        self._torch = cache  # of threads that come at once, each makes one and goes on with it
        (row,) = cache.add()
        try:
            if before is not None:
                cache.set_state(row, self._saved(before))
            cache.feed([row], [ids])
            return self._loaded(cache.state(row))
        finally:
            cache.drop([row])

    # -- What is saved -----------------------------------------------------------------------------

    def _saved(self, saved: Any) -> State:
        """What the engine saves as a state."""
        state = {"length": saved.length, "taken": saved.taken, **saved.tensors}
        for n, hosted in saved.hosted.items():
            host = self._packed.hosted[n]
            position = schedule.position(self._model.patch_sizes, n, saved.taken)
            for name, value in host.saved(hosted if position else host.start).items():
                state[f"{n}.{name}"] = value
        return state

    def _loaded(self, state: State) -> Any:
        """The same for the engine, which checks names and shapes."""
        length, taken, tail, parts = parts_of_state(state, self._model)
        tensors = {"tail": tail}
        states: dict[int, Share] = {}
        for n, own in enumerate(parts):
            with names_stage(n):
                if n in self._packed.hosted:
                    positions = 1 + schedule.position(self._model.patch_sizes, n, taken)
                    rest = {name: own.pop(name) for name in [*own] if name not in _ENGINES_OWN}
                    states[n] = self._packed.hosted[n].loaded(rest, positions)
                for name in own:
                    tensors[f"{n}.{name}"] = tensor_of(own, name).detach().cpu().float()
        return _native.library().State(length, taken, tensors, states)
