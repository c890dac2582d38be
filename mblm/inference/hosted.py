"""A stage that Python steps: one immutable state per row, stacked for a call of many.

What a call gives for several rows stays one value, of which each row has a share. As long as the
same rows come in the same order, nothing is stacked, split or copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mblm.model.causal import CausalHierarchy
from mblm.model.plain import is_bare
from mblm.model.stage import Carried, has_values, tensor_of
from mblm.utils.modes import own_copy


@dataclass(frozen=True, eq=False)
class Share:
    """The share of a row in a state that was computed for several."""

    whole: Any
    index: int = 0
    count: int = 1


def embedded(
    model: CausalHierarchy,
    n: int,
    ids: Tensor,
    positions: Sequence[int],
    contexts: Sequence[Tensor] | None,
) -> Tensor:
    """What stage n takes in, ``(rows, S, D_n)``: patches ``ids (rows, S * R_n)`` of each row.

    ``positions`` are the rows' first; ``contexts``, ``(P_n, D_n)`` each, are from the stage above.
    """
    x = model.embed_tokens(n, ids.to(model.device))
    first, count = positions[0], x.shape[1]
    if any(position != first for position in positions):
        x = model.add_positions(n, x, torch.tensor(positions, device=x.device))
    else:
        x = model.add_positions(n, x, first)
    if contexts is None:
        return x
    pairs = zip(contexts, positions, strict=True)
    return x + torch.stack([context[first : first + count] for context, first in pairs])


class HostedStage:
    """A stage model as decoding calls it; it holds no state itself.

    Args:
        stage: The stage model; what it offers is in `mblm.model.stage.Stage`.

    Attributes:
        stage: The same; where ``torch.compile`` wraps it, what is in the wrapper.
        dim: Its width D.
        start: The state after the start token, and ``start_output`` (1, D) of it.
        stacks: Whether the stage says how rows' states become one: it takes in many at once.
    """

    def __init__(self, stage: nn.Module, start_token: Tensor) -> None:
        own: Any = getattr(stage, "_orig_mod", stage)
        self.stage, self.dim = own, start_token.shape[-1]
        self._takes_carried = getattr(own, "takes_carried", None)
        self._takes_state = self._takes_carried or (
            self._takes_carried is None and hasattr(own, "forward_with_state") and is_bare(own)
        )
        self.stacks = self._takes_state and _has(own, "stack_states", "split_state")
        self._names = self._takes_state and _has(own, "state_tensors", "state_of")
        output, (self.start,) = self.advance([Share(None)], start_token.expand(1, 1, -1))
        self.start_output = output[:, 0]

    def advance(self, states: Sequence[Share], x: Tensor) -> tuple[Tensor, list[Share]]:
        """Take in the next positions of rows, ``x (B, S, D)``: ``(B, S, D)`` and their states."""
        if not self._takes_state:
            return self._replay(states, x)
        if self.stacks or len(states) == 1:
            y, state = self._call(x, self._stacked(states))
            return y, [Share(state, row, len(states)) for row in range(len(states))]
        outputs, after = [], []
        for row, state in enumerate(states):
            y, state = self._call(x[row : row + 1], state.whole)
            outputs.append(y)
            after.append(Share(state))
        return torch.cat(outputs), after

    def _call(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Continue rows ``x (B, S, D)`` after a state of them."""
        stage = self.stage
        if is_bare(stage):  # and compiled for training, maybe
            out: tuple[Tensor, Any] = stage.forward_with_state(x, state)
            return out
        if not self._takes_carried:
            raise RuntimeError(
                f"a hook was added to a {type(stage).__name__} after decoding began, which its "
                "forward_with_state would not call; start a new session"
            )
        carried = Carried(state)
        y: Tensor = stage(x, carried=carried)
        return y, carried.after

    def _stacked(self, states: Sequence[Share]) -> Any:
        """The state of all rows in one: as it is, if it is of these rows in this order."""
        first, count = states[0], len(states)
        same = (s.whole is first.whole and s.index == row for row, s in enumerate(states))
        if first.count == count and all(same):
            return first.whole
        return self.stage.stack_states(self._rows(states))

    def _rows(self, states: Sequence[Share]) -> list[Any]:
        """The state of each row by itself."""
        split: dict[int, list[Any]] = {}  # by the identity of what is split, once
        for state in states:
            if state.count > 1 and id(state.whole) not in split:
                split[id(state.whole)] = self.stage.split_state(state.whole)
        return [s.whole if s.count == 1 else split[id(s.whole)][s.index] for s in states]

    def _replay(self, states: Sequence[Share], x: Tensor) -> tuple[Tensor, list[Share]]:
        """Run the stage on all inputs since the start token; a state is the inputs ``(S, D)``.

        Rows are padded on the right, which a causal stage does not see.
        """
        kept = [
            new if state.whole is None else torch.cat((state.whole, new))
            for state, new in zip(states, x, strict=True)
        ]
        y: Tensor = self.stage(pad_sequence(kept, batch_first=True))
        lengths = [len(row) for row in kept]
        new = [row[end - x.shape[1] : end] for row, end in zip(y, lengths, strict=True)]
        return torch.stack(new), [Share(row) for row in kept]

    # -- What is saved -----------------------------------------------------------------------------

    def saved(self, state: Share) -> dict[str, Any]:
        """A row's state by names: the stage's own, or ``state``, a nest of tensors."""
        (row,) = self._rows([state])
        given = self.stage.state_tensors(row) if self._names else {"state": row}
        return {name: _copy_nest(value, own_copy) for name, value in given.items()}

    def loaded(self, given: Mapping[str, Any], positions: int) -> Share:
        """The state of a row from what `saved` gave, after so many positions.

        Raises:
            ValueError: It does not fit the stage.
        """
        like = self.saved(self.start)
        if given.keys() != like.keys():
            raise ValueError(f"expected {', '.join(like)}, got {', '.join(given) or 'nothing'}")
        device = self.start_output.device

        def copy(tensor: Tensor) -> Tensor:
            return has_values("state", tensor).detach().to(device, copy=True)

        kept = {name: _copy_nest(value, copy) for name, value in given.items()}
        if not self._takes_state:
            inputs = tensor_of(kept, "state", (positions, self.dim))
            return Share(inputs.to(self.start_output.dtype))
        state = self.stage.state_of(kept, positions) if self._names else kept["state"]
        if self._takes_carried:
            return Share(state)
        try:  # what a user's stage can continue is for it to say
            y, _ = self._call(self.start_output.new_zeros(1, 1, self.dim), state)
        except Exception as error:
            raise ValueError(f"the stage cannot continue it ({error!r})") from error
        if y.shape != (1, 1, self.dim):
            raise ValueError(f"the stage gives {tuple(y.shape)} after it")
        return Share(state)


def _has(stage: Any, *names: str) -> bool:
    return all(hasattr(stage, name) for name in names)


def _copy_nest(value: Any, copy: Any) -> Any:
    """A nest with its tensors copied."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, (tuple, list)):
        make = getattr(value, "_make", type(value))  # of a named tuple
        return make(_copy_nest(item, copy) for item in value)
    if value is None:
        return None
    raise ValueError(f"expected tensors, tuples, lists and None, got {type(value).__name__}")
