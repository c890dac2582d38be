"""Automata over token ids: what a row may go on with, and what ends it."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mblm.utils.checks import check_integer, kind_of

# More states than that do not fit the engine's 32-bit integers.
_MAX_STATES = 2**31 - 1


class Automaton:
    """A deterministic automaton; immutable.

    Transitions by classes without tokens are made forbidden, and those to states from which none
    that accepts is reached.

    Args:
        classes: The class of each token id, ``(V,)`` of any integer dtype.
        next: The next state per state and class, ``(states, classes)`` of any integer dtype; -1
            forbids the class.
        accepting: Which states accept, ``(states,)`` bool.
        start: The first state. Default 0.

    Attributes:
        classes, next: As given, int32 on the CPU.
        distance: Fewest tokens from each state to one that accepts, ``(states,)`` int32; 0 where
            the state itself accepts, -1 where none is reached.
        start: The first state.

    Raises:
        TypeError, ValueError: A table of another kind or shape, or with a class or a state that
            there is not.
    """

    def __init__(self, classes: Tensor, next: Tensor, accepting: Tensor, start: int = 0) -> None:
        table, start = _integers("next", next, 2), check_integer("start", start)
        num_states, num_classes = table.shape
        if not 0 < num_states <= _MAX_STATES:
            raise ValueError(f"next: expected 1 to {_MAX_STATES} states, got {num_states}")
        self.classes = _integers("classes", classes, 1).int()
        _check_range("classes", self.classes, 0, num_classes)
        _check_range("next", table, -1, num_states)
        if not isinstance(accepting, Tensor) or accepting.dtype != torch.bool:
            raise TypeError(f"accepting: expected a bool tensor, got {kind_of(accepting)}")
        if accepting.shape != (num_states,):
            raise ValueError(
                f"accepting: expected shape ({num_states},), one for each row of next, "
                f"got {tuple(accepting.shape)}"
            )
        if not 0 <= start < num_states:
            raise ValueError(f"start: expected a state in [0, {num_states}), got {start}")
        self.start = start
        has_tokens = torch.zeros(num_classes, dtype=torch.bool, device="cpu")
        has_tokens[self.classes.long()] = True
        table = torch.where(has_tokens, table, -1)
        self.distance = _distances(table, accepting.cpu())
        leads_on = (table >= 0) & (self.distance[table.clamp(min=0)] >= 0)
        self.next = torch.where(leads_on, table, -1).int()

    @classmethod
    def of_strings(cls, strings: Iterable[bytes | Sequence[int]], num_tokens: int) -> "Automaton":
        """Accepts wherever one of the strings ends: Aho and Corasick 1975, CACM 18 (6).

        Args:
            strings: Byte strings or lists of token ids, none of them empty. One with an id outside
                the vocabulary is never found.
            num_tokens: V.

        Raises:
            ValueError: An empty string.
        """
        nodes: list[dict[int, int]] = [{}]  # per node, the node after each token
        accepting = [False]
        for string in strings:
            if not len(string):
                raise ValueError("strings: expected strings that are not empty")
            if not all(0 <= token < num_tokens for token in string):
                continue
            node = 0
            for token in string:
                if token not in nodes[node]:
                    nodes[node][token] = len(nodes)
                    nodes.append({})
                    accepting.append(False)
                node = nodes[node][token]
            accepting[node] = True
        # Class 0 is all tokens that no string has: they lead to the root.
        tokens = sorted({token for node in nodes for token in node})
        rows = [[0] * (1 + len(tokens)) for _ in nodes]
        suffix = [0] * len(nodes)  # the node of the longest proper suffix
        queue = deque([0])
        while queue:
            node = queue.popleft()
            accepting[node] |= accepting[suffix[node]]
            for index, token in enumerate(tokens, 1):
                after = rows[suffix[node]][index] if node else 0
                child = nodes[node].get(token)
                rows[node][index] = after if child is None else child
                if child is not None:
                    suffix[child] = after
                    queue.append(child)
        classes = torch.zeros(num_tokens, dtype=torch.int32, device="cpu")
        classes[tokens] = torch.arange(1, 1 + len(tokens), dtype=torch.int32, device="cpu")
        table = torch.tensor(rows, dtype=torch.int32, device="cpu")
        return cls(classes, table, torch.tensor(accepting, device="cpu"))

    def ending_by(self, token: int) -> "Automaton":
        """The same, but a token that may not come otherwise ends it: where it accepts and may go
        on."""
        states, num_classes = self.next.shape
        classes = self.classes.clone()
        classes[token] = num_classes
        goes_on = (self.next >= 0).any(1)
        ends = torch.where(goes_on & (self.distance == 0), states, -1)
        table = torch.full((states + 1, num_classes + 1), -1, device="cpu")
        table[:-1, :-1], table[:-1, -1] = self.next, ends
        accepting = torch.cat((self.distance == 0, torch.ones(1, dtype=torch.bool, device="cpu")))
        return Automaton(classes, table, accepting, self.start)

    def step(self, state: int, token: int) -> int:
        """The state after a token; -1 if it is forbidden, or if ``state`` is -1."""
        return -1 if state < 0 else int(self.next[state, self.classes[token]])

    def walk(self, ids: Tensor) -> int:
        """The state after ids ``(n,)`` int64 from the start on; -1 if one is forbidden."""
        state, table = self.start, self.next.numpy()
        for token_class in self.classes[ids].tolist():
            state = int(table[state, token_class]) if state >= 0 else -1
        return state

    def accepts(self, state: int) -> bool:
        """Whether what was read so far is accepted."""
        return state >= 0 and int(self.distance[state]) == 0

    def is_complete(self, state: int) -> bool:
        """Whether what was read so far is accepted, and nothing may follow."""
        return self.accepts(state) and not self.allowed(state, len(self.next)).any()

    def allowed(self, state: int, left: int) -> Tensor:
        """The tokens that may come, ``(V,)`` bool, with ``left`` tokens to come, these included.

        Where acceptance can be reached with so many, it stays reachable.
        """
        after = self.next[state]  # per class
        allowed = after >= 0
        if int(self.distance[state]) <= left:
            allowed &= self.distance[after.clamp(min=0)] <= left - 1
        return allowed[self.classes]


def _distances(table: Tensor, accepting: Tensor) -> Tensor:
    """Fewest tokens to a state that accepts, -1 where none is reached, breadth first."""
    num_states = len(table)
    sources, _ = (table >= 0).nonzero(as_tuple=True)
    edges = (table[table >= 0] * num_states + sources).unique()  # by the state they lead to
    ends = torch.searchsorted(edges, torch.arange(num_states + 1, device="cpu") * num_states)
    offsets, before = ends.tolist(), (edges % num_states).tolist()
    distance = torch.where(accepting, 0, -1).tolist()
    queue = deque(state for state, steps in enumerate(distance) if steps == 0)
    while queue:
        state = queue.popleft()
        for source in before[offsets[state] : offsets[state + 1]]:
            if distance[source] < 0:
                distance[source] = distance[state] + 1
                queue.append(source)
    return torch.tensor(distance, dtype=torch.int32, device="cpu")


def _integers(name: str, table: Any, ndim: int) -> Tensor:
    """A table as int64 on the CPU."""
    if not isinstance(table, Tensor) or table.is_floating_point() or table.dtype == torch.bool:
        raise TypeError(f"{name}: expected a tensor of integers, got {kind_of(table)}")
    if table.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(table.shape)}")
    return table.detach().cpu().long()


def _check_range(name: str, table: Tensor, lowest: int, end: int) -> None:
    if table.numel() and not (lowest <= int(table.min()) and int(table.max()) < end):
        raise ValueError(
            f"{name}: expected values in [{lowest}, {end}), got {int(table.min())} to "
            f"{int(table.max())}"
        )
