"""Sequences of bytes, cut to pieces and scored many at a time by passes over the stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mblm.inference.arguments import check_model
from mblm.inference.hosted import HostedStage
from mblm.model.causal import CausalHierarchy
from mblm.model.tiled_pass import TiledPass
from mblm.model.tiles import INFERENCE_TILE
from mblm.utils.checks import check_integer

# Bytes that are taken in together by default.
BATCH_BYTES = 1 << 16


class Piece(NamedTuple):
    """Bytes of a sequence: what is taken in and what is scored.

    Attributes:
        ids: ``(n,)`` int64. The last one is only predicted, not taken in.
        first: Those from here on are scored.
        before: How many bytes of its sequence have been taken in before it; None for a whole
            sequence.
        text: Which text it belongs to.
        start: Where in the text what is scored begins.
    """

    ids: Tensor
    first: int
    before: int | None = None
    text: int = 0
    start: int = 0


class Source:
    """A text, read once from its beginning to its end.

    Args:
        ids: Its bytes or the first of them, ``(L,)`` int64.
        read: Gives as many more as it is asked for, fewer only at the end. Default: there are none.
    """

    def __init__(self, ids: Tensor, read: Callable[[int], Tensor] | None = None) -> None:
        self._ids, self._begin, self._read = ids, 0, read

    def take(self, begin: int, end: int) -> Tensor:
        """The bytes from ``begin`` up to ``end``, as far as there are; earlier ones are gone."""
        missing = end - self._begin - len(self._ids)
        if missing > 0 and self._read is not None:
            new = self._read(missing)
            if len(new) < missing:
                self._read = None
            self._ids, self._begin = torch.cat((self._ids[begin - self._begin :], new)), begin
        return self._ids[begin - self._begin : end - self._begin]


class Scorer:
    """Scores pieces of sequences, many at a time.

    Args:
        model: See `mblm.MBLM.score`, as the others.
        length: Bytes of a window.
        stride: How many of them are scored.
        batch_bytes: Bytes that are taken in together.
        alternatives: How many of the likeliest ids to tell for each byte, up to all of them.
    """

    def __init__(
        self,
        model: CausalHierarchy,
        length: int | None = None,
        stride: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        alternatives: int = 0,
    ) -> None:
        check_model(model)
        self._model = model
        self._length, self._stride = _check_window(model, length, stride)
        self._batch_bytes = check_integer("batch_bytes", batch_bytes, 1)
        self._alternatives = alternatives
        patch = model.patch_sizes[0]
        self._piece_bytes = max(self._batch_bytes // patch, 1) * patch
        tile = model.config.tile or INFERENCE_TILE
        with torch.inference_mode():
            self._tiles = TiledPass(model, tile, model.pad_token_id)
            self._stage = HostedStage(model.stage_models[0], model.start_token(0, 1))
            self._empty_logits = model.empty_logits(1)[0]  # (1, V)
        # After the bytes of a sequence that comes piece by piece.
        self._state, self._output = self._stage.start, self._stage.start_output

    # -- What is scored together -------------------------------------------------------------------

    def pieces(self, source: Source, scored: int = 0, text: int = 0) -> Iterator[Piece]:
        """The pieces of a text, of which the bytes from ``scored`` on are scored, each once."""
        if self._length is None:
            yield from self._pieces_of_whole(source, scored, text)
            return
        at = scored
        while True:
            # Before the first byte that is scored, a window has fewer than its length.
            begin = max(at + 1 - self._length, 0)
            ids = source.take(begin, max(at + self._stride, self._length))
            new = begin + len(ids) - at
            if new <= 0:
                return
            ids = ids[max(len(ids) - self._length, 0) :]
            yield Piece(ids, len(ids) - new, text=text, start=at - scored)
            at += new

    def _pieces_of_whole(self, source: Source, scored: int, text: int) -> Iterator[Piece]:
        """A text as one sequence."""
        ids = source.take(0, self._batch_bytes + 1)
        if len(ids) <= self._batch_bytes:
            if len(ids) > scored:
                yield Piece(ids, scored, text=text)
            return
        at = 0
        while True:
            seen = int(at > 0)  # the last byte of the piece before
            ids = source.take(at, at + self._piece_bytes + 1)
            if len(ids) <= seen:
                return
            first = min(max(scored - at, seen), len(ids))
            yield Piece(ids, first, at, text, at + first - scored)
            at += len(ids) - 1

    def run(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """Score pieces: ``(scored, 2 + 2 * alternatives)`` float32 on the CPU.

        A row is a byte's log-probability, whether it is the likeliest, the likeliest ids, the
        likeliest first, and their log-probabilities.

        Whole sequences that follow each other are taken in together, as many as ``batch_bytes``
        allows. Those of a sequence that comes piece by piece follow each other.
        """
        for batch in self._batches(pieces):
            yield from zip(batch, self._scores(batch), strict=True)

    def _batches(self, pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
        batch: list[Piece] = []
        longest = 0
        for piece in pieces:
            longest = max(longest, len(piece.ids))
            is_full = (len(batch) + 1) * longest > self._batch_bytes
            if batch and (is_full or piece.before is not None or batch[0].before is not None):
                yield batch
                batch, longest = [], len(piece.ids)
            batch.append(piece)
        if batch:
            yield batch

    # -- The pass ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _scores(self, pieces: Sequence[Piece]) -> list[Tensor]:
        model, patch = self._model, self._model.patch_sizes[0]
        # A byte is predicted by the logits of the byte before it.
        positions = -(-max(len(piece.ids) - 1 for piece in pieces) // patch)
        ids = torch.full((len(pieces), positions * patch + 1), model.pad_token_id, device="cpu")
        wanted: list[int] = []  # the positions of stage 1 whose bytes predict what is scored
        counts = []
        for row, piece in enumerate(pieces):
            ids[row, : len(piece.ids)] = piece.ids
            begin = row * positions + max(piece.first - 1, 0) // patch
            end = row * positions - (-(len(piece.ids) - 1) // patch)
            counts.append(max(end - begin, 0) if piece.first < len(piece.ids) else 0)
            wanted.extend(range(begin, begin + counts[-1]))
        found = torch.empty(0, 2 + 2 * self._alternatives, device="cpu")
        if positions:
            ids = ids.to(model.device)
            taken_in, targets = ids[:, :-1], ids[:, 1:]
            attended = self._attend_global(taken_in, pieces[0].before)
            if wanted:
                rows = torch.tensor(wanted, device=model.device)
                above = model.below_positions(0, attended).flatten(0, 1)[rows]
                by_patch = [t.reshape(-1, patch)[rows] for t in (taken_in, targets)]
                found = self._tiles.per_byte(self._log_probs, above, *by_patch).cpu()
        of_pieces = found.split([count * patch for count in counts])
        return list(map(self._of_piece, pieces, of_pieces))

    def _attend_global(self, ids: Tensor, before: int | None) -> Tensor:
        """Output of stage 1 for whole patches, ids ``(B, S * R_1)``: ``(B, 1 + S, D_1)``."""
        if before is None:
            return self._model.attend_global(ids, self._tiles)
        if before == 0:
            self._state, self._output = self._stage.start, self._stage.start_output
        x = self._model.embed_tokens(0, ids)
        x = self._model.add_positions(0, x, before // self._model.patch_sizes[0])
        y, (self._state,) = self._stage.advance([self._state], x)
        attended = torch.cat((self._output[:, None], y), dim=1)
        self._output = y[:, -1].clone()
        return attended

    def _of_piece(self, piece: Piece, found: Tensor) -> Tensor:
        """What was found for the patches of a piece, cut to what is scored of it."""
        first = max(piece.first - 1, 0) % self._model.patch_sizes[0]
        is_begin = piece.first == 0
        per_byte = found[first : first + len(piece.ids) - piece.first - is_begin]
        if not is_begin:
            return per_byte
        of_first = self._log_probs(self._empty_logits, piece.ids[:1].to(self._model.device))
        return torch.cat((of_first.cpu(), per_byte))

    def _log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The rows of `run`, of logits ``(S, V)`` and the ids ``(S,)`` that they predict."""
        log_probs = logits.float().log_softmax(-1)
        is_likeliest = logits.argmax(-1, keepdim=True) == targets[:, None]
        columns = [log_probs.gather(1, targets[:, None]), is_likeliest.float()]
        if self._alternatives:
            likeliest = log_probs.topk(self._alternatives)
            columns += [likeliest.indices.float(), likeliest.values]
        return torch.cat(columns, dim=1)


def sequence_length(model: CausalHierarchy) -> int | None:
    """How many bytes a sequence has at most for the model to know its way in them; None: any.

    That is its context, unless its most global stage is recurrent and has no fixed positions.
    """
    is_recurrent = getattr(model.stage_models[0], "is_recurrent", False)
    return None if is_recurrent and model.max_length is None else model.context_size


def _check_window(
    model: CausalHierarchy, length: int | None, stride: int | None
) -> tuple[int | None, int]:
    """The bytes of a window, None without windows, and how many of them are scored."""
    limit = model.max_length
    if length is None:
        length = sequence_length(model) if stride is None else model.context_size
    if length is None:
        return None, 0
    length = check_integer("length", length)
    if length < 1 or (limit is not None and length > limit):
        most = "" if limit is None else f" to {limit}, the model's context"
        raise ValueError(f"length: expected a number from 1{most}, got {length}")
    stride = max(length // 2, 1) if stride is None else check_integer("stride", stride)
    if not 1 <= stride <= length:
        raise ValueError(
            f"stride: expected a number from 1 to {length}, the length of a window, got {stride}"
        )
    return length, stride
