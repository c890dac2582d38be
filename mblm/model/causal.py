"""A causal hierarchy: its pass over the stages, and what incremental decoding needs of it."""

import torch
from torch import Tensor, nn

from mblm.model.config import MBLMModelConfig
from mblm.model.hierarchy import Hierarchy, StageTokens
from mblm.model.tiled_pass import TiledPass
from mblm.ops.assemble_stage import assemble_stage


class CausalHierarchy(Hierarchy):
    """Stages that begin with a start token, each position of which sees those before it."""

    def __init__(self, config: MBLMModelConfig) -> None:
        super().__init__(config, start_tokens=True)

    def _run_on_tokens(
        self, stage: int, tokens: StageTokens, context: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """Output ``a_0 .. a_P`` of a stage, ``(rows, 1 + P_n, D_n)``; there is no mask."""
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

    def attend_global(self, padded_ids: Tensor, tiles: TiledPass) -> Tensor:
        """Output of stage 1 for whole patches, ids ``(B, S * R_1)``: ``(B, 1 + S, D_1)``."""
        return self._run_on_tokens(0, tiles.global_tokens(padded_ids), None)

    def below_positions(self, stage: int, attended: Tensor) -> Tensor:
        """See `Hierarchy.below_positions`: ``a_j`` has seen what is before patch j.

        ``a_P`` of a patch is for nobody above the local stage.
        """
        return attended[:, :-1] if stage + 1 < self.num_stages else attended[:, 1:]

    def empty_logits(self, batch_size: int) -> Tensor:
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

    def start_token(self, stage: int, batch_size: int) -> Tensor:
        """A stage's start token, ``(batch_size, D_n)``."""
        return self.start_tokens[stage].expand(batch_size, -1)

    def embed_tokens(self, stage: int, ids: Tensor) -> Tensor:
        """Token embeddings of whole patches of a stage, ids ``(B, S * R_n)`` -> ``(B, S, D_n)``."""
        embeddings, of_table = self._tokens(stage, ids)
        return embeddings if of_table is None else nn.functional.embedding(of_table, embeddings)
