"""A causal hierarchy: its pass over the stages, and what incremental decoding needs of it."""

from collections.abc import Callable

import torch
from torch import nn

from mblm.model.config import MBLMModelConfig
from mblm.model.hierarchy import Hierarchy, StageTokens
from mblm.model.tiled_pass import TiledPass
from mblm.ops.assemble_stage import assemble_stage


class CausalHierarchy(Hierarchy):
    """Stages that begin with a start token, each position of which sees those before it."""

    def __init__(self, config: MBLMModelConfig) -> None:
        super().__init__(config, start_tokens=True)

    def _run_stage(
        self, stage: int, tokens: StageTokens, context: torch.Tensor | None
    ) -> torch.Tensor:
        """Output ``a_0 .. a_P`` of a stage, ``(rows, 1 + P_n, D_n)``."""
        embeddings, ids = tokens
        positions = rotation = None
        if self.rotates_itself(stage):
            if ids is not None:
                embeddings, ids = nn.functional.embedding(ids, embeddings, self.pad_token_id), None
            embeddings = self.add_positions(stage, embeddings)
        else:
            seq_len = (embeddings if ids is None else ids).shape[1]
            positions, rotation = self.positions(stage, 0, seq_len)
        x = assemble_stage(
            self.start_tokens[stage],
            embeddings,
            ids,
            positions,
            rotation,
            context,
            padding_idx=self.pad_token_id,
        )
        return self.run_stage(stage, x)

    def _attend(self, tokens: Callable[[int], StageTokens]) -> torch.Tensor:
        """Run all stages; returns the local stage's ``a_0 .. a_P``, ``(rows, 1 + P_N, D_N)``."""
        context = None
        for stage in range(self.num_stages):
            attended = self._run_stage(stage, tokens(stage), context)
            if stage + 1 < self.num_stages:  # a_P of a patch is for nobody
                context = self.project_context(stage, attended[:, :-1])
        return attended

    def attend_global(self, padded_ids: torch.Tensor, tiles: TiledPass) -> torch.Tensor:
        """Output of stage 1 for whole patches, ids ``(B, S * R_1)``: ``(B, 1 + S, D_1)``."""
        return self._run_stage(0, tiles.global_tokens(padded_ids), None)

    def attend(
        self, stage: int, above: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Hierarchy.attend`; the output begins with the start position, S is 1 + P_n."""
        context = self.project_context(stage - 1, above[None])
        return self._run_stage(stage, self._tokens(stage, ids), context)

    def below_positions(self, stage: int, attended: torch.Tensor) -> torch.Tensor:
        """See `Hierarchy.below_positions`: ``a_j`` has seen what is before patch j."""
        return attended[:, :-1] if stage + 1 < self.num_stages else attended[:, 1:]

    def empty_logits(self, batch_size: int) -> torch.Tensor:
        """Logits of the first byte, when there is none yet: ``(batch_size, 1, V)``.

        Only here does a start token get context: row 0 of what the stage above projects.
        """
        attended = torch.empty(0)
        for stage in range(self.num_stages):
            x = self.start_token(stage, batch_size)[:, None]
            if stage > 0:
                x = x + self.project_context(stage - 1, attended)[:, :1]
            attended = self.stage_models[stage](x)
        return self.compute_logits(attended)

    def start_token(self, stage: int, batch_size: int) -> torch.Tensor:
        """A stage's start token, ``(batch_size, D_n)``."""
        return self.start_tokens[stage].expand(batch_size, -1)

    def embed_tokens(self, stage: int, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of whole patches of a stage, ids ``(B, S * R_n)`` -> ``(B, S, D_n)``."""
        embeddings, of_table = self._tokens(stage, ids)
        return embeddings if of_table is None else nn.functional.embedding(of_table, embeddings)
