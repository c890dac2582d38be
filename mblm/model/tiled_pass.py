"""A pass over long sequences in which only the most global stage holds all of its positions.

What hangs on a position of a stage, its context and the stages below, depends on no other position
of that stage. So the stages below run on tiles of positions, tiles within tiles where there are
three stages or more, down to the logits and the loss.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mblm.model.embeddings import PatchTokenEmbedding
from mblm.model.gradients import GradientSums, gradients_are_watched, with_weights_of_now
from mblm.model.hierarchy import Hierarchy, Projection, StageTokens, parts_of
from mblm.model.loss import losses_per_byte, sum_and_count
from mblm.model.plain import are_plain
from mblm.model.recomputation import run_in_segments
from mblm.model.tiles import SumAndCount, map_over_tiles, sum_over_tiles

# Bytes whose embeddings are held at once for the most global stage, per position of a tile: it has
# one linear layer where a stage has many.
_BYTES_PER_TILE_POSITION = 16


class TiledPass:
    """The stages below the most global one, and the embedding of that, in tiles.

    Args:
        model: The hierarchy.
        tile: Positions of the local stage in a tile; at least one row. Upper stages' tiles hold a
            quarter as many.
        ignored_id: The target that does not count in a loss.
    """

    def __init__(self, model: Hierarchy, tile: int, ignored_id: int) -> None:
        self.model = model
        self.tile = tile
        self.ignored_id = ignored_id
        self.local = model.num_stages - 1
        self._gradients = GradientSums(_parameters_below_global(model))
        self._recompute = gradients_are_watched(model)

    def global_tokens(self, ids: Tensor) -> StageTokens:
        """Token embeddings of the most global stage, ids ``(B, S * R_1)``.

        The embeddings of bytes exist for some patches at a time, also in the backward pass.
        """
        model = self.model
        if model.num_stages == 1:
            return model.local_tokens(ids)
        embedding: nn.Module = model.token_embs_rev[-1]
        sums = GradientSums(embedding.parameters())
        project: Projection | None = None
        if are_plain(parts_of(embedding, PatchTokenEmbedding)):
            project = functools.partial(sums.linear, model.parts_of_patches(0)[2])

        def embed(ids: Tensor) -> Tensor:
            return model.embed_patches(0, ids, 1, project).squeeze(1)

        # A tile reads the layer's weight, which is large where patches are: a few patches at least.
        # Their embeddings take 1/32 of its memory.
        patch_size, fewest = model.patch_sizes[0], max(1, model.hidden_dims[0] // 32)
        size = max(fewest, _BYTES_PER_TILE_POSITION * self.tile // patch_size)
        run, rows = with_weights_of_now(embedding, embed), ids.reshape(-1, patch_size)
        has_gradient = torch.is_grad_enabled() and sums.parameters
        if self._recompute or len(rows) <= size or not has_gradient:
            embedded = map_over_tiles(run, size, rows)
        else:
            embedded = run_in_segments(
                lambda x, _: (run(x[0])[None], ()), sums, rows[None], size, is_random=False
            )
        return embedded.view(len(ids), -1, embedded.shape[-1]), None

    def loss(
        self,
        attended: Tensor,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        stage: int = 0,
    ) -> SumAndCount:
        """Sum and count of the bytes' losses that are not zero.

        Args:
            attended: Output of the stage's model, ``(rows, S, D_n)``, with the start position.
            ids: Token ids ``(rows, S' * R_n)``, S' the positions without the start.
            targets: The ids that the bytes' logits predict, of the same shape.
            mask: Which bytes are attended to, for stages that take a mask.
            weights: Weight of each byte's loss. Default: 1.
            stage: The stage's index. Default: the most global one's.
        """
        rows = self.model.below_positions(stage, attended).flatten(0, 1)  # (rows * S', D_n)
        per_byte = [self._by_position(stage, t) for t in (ids, targets, mask, weights)]

        def tile(
            above: Tensor, ids: Tensor, targets: Tensor, mask: Tensor | None, weights: Tensor | None
        ) -> SumAndCount:
            if stage == self.local:
                logits = self.model.compute_logits(above)  # (S, V)
                return sum_and_count(losses_per_byte(logits, targets, weights, self.ignored_id))
            below = self.model.attend(stage + 1, above, ids, mask)
            return self.loss(below, ids, targets, mask, weights, stage=stage + 1)

        size = self._size(stage)
        if len(rows) <= size:
            return tile(rows, *per_byte)  # type: ignore[arg-type]
        run = with_weights_of_now(self.model, tile) if self._recompute else tile
        return sum_over_tiles(run, size, rows, per_byte, self._gradients, recompute=self._recompute)

    def loss_of_logits(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> SumAndCount:
        """The same from logits ``(.., V)``, targets and weights ``(..)``."""

        def tile(logits: Tensor, targets: Tensor, weights: Tensor | None) -> SumAndCount:
            return sum_and_count(losses_per_byte(logits, targets, weights, self.ignored_id))

        rows = [None if t is None else t.reshape(-1) for t in (targets, weights)]
        # Kept gradients would be one more tensor like the logits.
        no_parameters = GradientSums(())
        return sum_over_tiles(
            tile, self.tile, logits.flatten(0, -2), rows, no_parameters, recompute=True
        )

    def outputs(
        self,
        head: Callable[[Tensor], Tensor],
        attended: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        stage: int = 0,
    ) -> Tensor:
        """``head`` of the local stage's output ``(rows, S, D_N)``, for all of its rows.

        The other arguments are those of `loss`.
        """
        if stage == self.local:
            return head(attended)
        rows = self.model.below_positions(stage, attended).flatten(0, 1)

        def tile(above: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
            below = self.model.attend(stage + 1, above, ids, mask)
            return self.outputs(head, below, ids, mask, stage=stage + 1)

        per_byte = [self._by_position(stage, t) for t in (ids, mask)]
        run = with_weights_of_now(self.model, tile) if torch.is_grad_enabled() else tile
        return map_over_tiles(run, self._size(stage), rows, *per_byte)

    def per_byte(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        above: Tensor,
        ids: Tensor,
        targets: Tensor,
        *,
        stage: int = 0,
    ) -> Tensor:
        """``function`` of logits ``(S, V)`` and the ids ``(S,)`` that they predict, for all bytes.

        Args:
            function: Gives one row for each byte.
            above: What lies below positions of the stage, in any order: ``(rows, D_n)``; see
                `Hierarchy.below_positions`.
            ids: The ids of the positions' bytes, ``(rows, R_n)``.
            targets: The ids that the bytes' logits predict, of the same shape.
            stage: The stage's index. Default: the most global one's.

        Returns:
            ``(rows * R_n, ..)``.
        """

        def tile(above: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
            if stage == self.local:
                return function(self.model.compute_logits(above), targets[:, 0])
            below = self.model.attend(stage + 1, above, ids, None)
            rows = self.model.below_positions(stage + 1, below).flatten(0, 1)
            patches = [self._by_position(stage + 1, t) for t in (ids, targets)]
            return self.per_byte(function, rows, *patches, stage=stage + 1)  # type: ignore[arg-type]

        return map_over_tiles(tile, self._size(stage), above, ids, targets)

    def _size(self, stage: int) -> int:
        """How many positions of a stage have what is below them in one tile."""
        if stage == self.local:
            return self.tile
        # Tiles of upper stages stay in memory while those within them are computed, and have only
        # a patch's share of the work: they are smaller.
        below = self.tile if stage + 1 == self.local else self.tile // 4
        return max(1, below // self.model.seq_lens[stage + 1])

    def _by_position(self, stage: int, per_byte: Tensor | None) -> Tensor | None:
        """``(rows, S * R_n)`` to ``(rows * S, R_n)``."""
        return None if per_byte is None else per_byte.reshape(-1, self.model.patch_sizes[stage])


def _parameters_below_global(model: Hierarchy) -> list[nn.Parameter]:
    """The parameters that what hangs on a position of the most global stage is computed with."""
    modules: list[nn.Module] = [
        *model.to_next_stage_proj,
        *model.token_embs_rev[:-1],
        *model.pos_embs[1:],
        *model.stage_models[1:],
        model.to_logits,
    ]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    start_tokens = getattr(model, "start_tokens", [])
    parameters += [start_tokens[n] for n in range(1, len(start_tokens))]  # a slice holds copies
    return list(dict.fromkeys(parameters))
