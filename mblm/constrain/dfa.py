"""Deterministic automata: of a nondeterministic one, and of what two have in common."""

from array import array
from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

import numpy as np
import torch

from mblm.constrain.nfa import MAX_STATES, Nfa
from mblm.inference.automaton import Automaton

# Over all states, and over all that was looked at to find them: seconds, and 100 MB.
_MAX_TRANSITIONS = 4_000_000
_MAX_STEPS = 10_000_000

State = TypeVar("State", bound=Hashable)


def determinize(nfa: Nfa, num_tokens: int) -> Automaton:
    """The automaton whose states are the sets of states that are reached together."""
    every_byte = (1 << 256) - 1
    sets = {every_byte, *(of_bytes for edges in nfa.edges for of_bytes, _ in edges)}
    class_of, classes_in = _byte_classes(sets)
    reached = _without_a_byte(nfa)
    moves = [[(classes_in[of_bytes], reached(to)) for of_bytes, to in edges] for edges in nfa.edges]
    num_steps = 0

    def follow(states: frozenset[int]) -> dict[int, frozenset[int]]:
        nonlocal num_steps
        if len(states) == 1:
            (state,) = states
            return {index: to for classes, to in moves[state] for index in classes}
        after: dict[int, set[int]] = {}
        for state in states:
            for classes, to in moves[state]:
                num_steps += len(classes) * len(to)
                for index in classes:
                    after.setdefault(index, set()).update(to)
        if num_steps > _MAX_STEPS:
            raise ValueError(f"finding its states takes over {_MAX_STEPS} steps")
        return {index: frozenset(to) for index, to in after.items()}

    num_classes = int(class_of.max()) + 2  # the last for ids that are no bytes
    found, rows = _explore(reached(0), follow, num_classes)
    classes = torch.full((num_tokens,), num_classes - 1, device="cpu")
    classes[:256] = torch.from_numpy(class_of)[:num_tokens]
    accepting = torch.tensor([nfa.end in states for states in found], device="cpu")
    return Automaton(classes, rows, accepting)


def intersection(a: Automaton, b: Automaton) -> Automaton:
    """Accepts what both accept; they are of the same tokens."""
    pairs, classes = torch.stack((a.classes, b.classes)).unique(dim=1, return_inverse=True)
    rows_a, rows_b = a.next[:, pairs[0].long()].tolist(), b.next[:, pairs[1].long()].tolist()

    def follow(states: tuple[int, int]) -> dict[int, tuple[int, int]]:
        after = zip(rows_a[states[0]], rows_b[states[1]], strict=True)
        return {index: to for index, to in enumerate(after) if min(to) >= 0}

    found, rows = _explore((a.start, b.start), follow, pairs.shape[1])
    accepting = [a.accepts(of_a) and b.accepts(of_b) for of_a, of_b in found]
    return Automaton(classes, rows, torch.tensor(accepting, device="cpu"))


def _explore(
    start: State, follow: Callable[[State], dict[int, State]], num_classes: int
) -> tuple[list[State], torch.Tensor]:
    """All states that are reached, the start first, and the next one per class of tokens."""
    number, found, table = {start: 0}, [start], array("i")
    for state in found:  # which grows
        row = array("i", [-1]) * num_classes
        for index, to in follow(state).items():
            if to not in number:
                number[to] = len(found)
                found.append(to)
            row[index] = number[to]
        table += row
        if len(found) > MAX_STATES or len(found) * num_classes > _MAX_TRANSITIONS:
            raise ValueError(
                f"it needs more than {MAX_STATES} states, or {_MAX_TRANSITIONS} "
                "transitions; repeat less often, or smaller sets of characters"
            )
    return found, torch.frombuffer(table, dtype=torch.int32).view(-1, num_classes)


def _byte_classes(sets: Collection[int]) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Bytes that are in the same sets, as classes: the class of each byte, those in each set."""
    packed = b"".join(of_bytes.to_bytes(32, "little") for of_bytes in sets)
    members = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").reshape(-1, 256)
    in_classes, class_of = np.unique(members, axis=1, return_inverse=True)
    classes_in = [row.nonzero()[0].tolist() for row in in_classes]
    return class_of.reshape(-1), dict(zip(sets, classes_in, strict=True))


def _without_a_byte(nfa: Nfa) -> Callable[[int], frozenset[int]]:
    """Gives the states that are reached from one without a byte, those that matter."""
    known: dict[int, frozenset[int]] = {}

    def reached(state: int) -> frozenset[int]:
        if state not in known:
            seen, todo = {state}, [state]
            while todo:
                new = [to for to in nfa.free[todo.pop()] if to not in seen]
                seen.update(new)
                todo += new
            known[state] = frozenset(each for each in seen if nfa.edges[each] or each == nfa.end)
        return known[state]

    return reached
