"""Decoding states of sequences of different lengths, each at its own place in its own patch."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from mblm.inference.advance import feed
from mblm.inference.hierarchy_cache import HierarchyCache
from mblm.inference.sampling import Sampler, sampling_dtype
from mblm.inference.stage_cache import State

# Random numbers are drawn, and sequences wait for one another, for so many bytes at a time.
_CHUNK = 64


class RaggedCache:
    """A `HierarchyCache` of one sequence each, of one model, that advance side by side.

    In compiled code, a sequence whose patch is complete waits until the others' are, so that from
    then on all take in positions of every stage together: the weights are read once for all.
    """

    def __init__(self, rows: Sequence[HierarchyCache]) -> None:
        self.rows = list(rows)

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    def feed(self, ids: Sequence[torch.Tensor]) -> None:
        """Take in the next bytes of each sequence, ids ``(L,)`` int64, maybe none."""
        fed = [(row, part[None]) for row, part in zip(self.rows, ids, strict=True) if len(part)]
        if fed:
            feed([row for row, _ in fed], [part for _, part in fed])

    def logits(self) -> torch.Tensor:
        """Logits of the next bytes, ``(B, V)``."""
        return torch.cat([row.logits() for row in self.rows])

    def sample(self, num_tokens: int, sampler: Sampler) -> Iterator[torch.Tensor]:
        """Yield ids ``(B,)``, of which the last are not taken in."""
        pending: torch.Tensor | None = None
        for begin in range(0, num_tokens, _CHUNK):
            ids = self._sample_chunk(pending, min(_CHUNK, num_tokens - begin), sampler)
            yield from ids.unbind(dim=1)
            pending = ids[:, -1]

    def _sample_chunk(
        self, pending: torch.Tensor | None, count: int, sampler: Sampler
    ) -> torch.Tensor:
        """``count`` bytes of every sequence, ids ``(B, count)``; the last are not taken in."""
        model, size = self.rows[0].model, len(self.rows)
        # The n-th bytes of all sequences have the n-th numbers, whenever they are sampled.
        uniform = torch.empty(
            count, size, model.num_tokens, dtype=sampling_dtype(model.dtype), device=model.device
        )
        uniform.uniform_(0, 1, generator=sampler.generator)
        ids = torch.empty(size, count, dtype=torch.long, device=model.device)
        done = [0] * size
        # The byte that each takes in first, (1,); None before the first of all.
        first = [None if pending is None else pending[r : r + 1] for r in range(size)]
        while min(done) < count:
            going = [r for r in range(size) if done[r] < count]
            can_run = [r for r in going if self.rows[r].can_run(first[r])]
            groups = [
                [r for r in can_run if first[r] is not None],
                [r for r in can_run if first[r] is None],
                *([r] for r in going if r not in can_run),
            ]
            for group in filter(None, groups):
                runs = self._run(
                    group,
                    [first[r] for r in group],
                    [count - done[r] for r in group],
                    sampler,
                    [uniform[done[r] :, r] for r in group],
                )
                for r, run in zip(group, runs, strict=True):
                    ids[r, done[r] : done[r] + run.shape[1]] = run[0]
                    done[r] += run.shape[1]
                    first[r] = run[:, -1]
        return ids

    def _run(
        self,
        group: Sequence[int],
        first: Sequence[torch.Tensor | None],
        max_tokens: Sequence[int],
        sampler: Sampler,
        uniform: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Ids ``(1, n)`` of some sequences that all begin with a byte, or all without one."""
        rows = [self.rows[r] for r in group]
        given = [byte for byte in first if byte is not None]
        native = rows[0].native
        if native is None or not rows[0].can_run(first[0]):
            (row,) = rows
            for byte in given:
                row.feed(byte[:, None])
            return [sampler(row.logits(), uniform[0][:1])[:, None]]
        numbers = pad_sequence(list(uniform), batch_first=True).contiguous()
        pending = torch.cat(given) if given else None
        return native.run(rows, pending, max_tokens, sampler, uniform=numbers)

    def fork(self) -> "RaggedCache":
        """An independent copy."""
        return RaggedCache([row.fork() for row in self.rows])

    def snapshot(self) -> State:
        return [row.snapshot() for row in self.rows]

    def restore(self, state: State) -> None:
        for row, saved in zip(self.rows, state, strict=True):
            row.restore(saved)
