"""The hierarchy that decoder and encoder share: parameters, nesting, embeddings, contexts."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mblm.model.checks import check_embeddings, check_hierarchy_shape
from mblm.model.config import MBLMModelConfig
from mblm.model.embeddings import (
    LocalTokenEmbedding,
    PatchTokenEmbedding,
    build_token_embeddings,
    migrate_embedding_keys,
)
from mblm.model.gradients import with_weights_of_now
from mblm.model.linear import apply, apply_in_order
from mblm.model.plain import Part, is_plain, parts_in
from mblm.model.recomputation import run_recomputed, saved_on_host
from mblm.model.tiles import INFERENCE_TILE
from mblm.model.utils import RoPE, rotate_pairs
from mblm.utils.checks import check_token_ids
from mblm.utils.transforms import is_transformed

# A stage's token embeddings: (rows, P_n, D_n) and None, or a table (V, D_n) and ids (rows, P_n).
StageTokens = tuple[Tensor, Tensor | None]
# What may stand in for a linear layer.
Projection = Callable[[Tensor], Tensor]

_POSITIONS: dict[str | None, Any] = {"fixed": nn.Embedding, "rope": RoPE, None: nn.Identity}


class Hierarchy(nn.Module):
    """Stages 1 (most global) .. N (local), and what lies between them.

    Attributes:
        config: The configuration the hierarchy was built from.
        seq_lens: P_1 .. P_N.
        patch_sizes: R_1 .. R_N, the bytes that one position of a stage covers; R_N is 1.
        packed_weights: What `mblm.inference.weights` keeps with it, by type of weights.
    """

    packed_weights: dict[str, Any]

    def __init__(self, config: MBLMModelConfig, *, start_tokens: bool) -> None:
        super().__init__()
        self.config = config
        self.packed_weights = {}
        self.num_stages = len(config.seq_lens)
        self.num_tokens = config.num_tokens
        self.pad_token_id = config.pad_token_id
        self.hidden_dims = list(config.hidden_dims)
        self.seq_lens = list(config.seq_lens)
        self.patch_sizes = [math.prod(self.seq_lens[n + 1 :]) for n in range(self.num_stages)]
        chunks = config.train_checkpoint_chunks
        if chunks and len(chunks) != self.num_stages - 1:
            raise ValueError(
                f"train_checkpoint_chunks has {len(chunks)} entries, expected one for each of "
                f"the {self.num_stages - 1} stages below the first"
            )
        self.checkpoint_chunks = [None, *chunks] if chunks else [None] * self.num_stages

        # The order of construction is part of the contract: a seed means the same weights.
        if start_tokens:
            self.start_tokens = nn.ParameterList(
                [nn.Parameter(torch.randn(dim)) for dim in self.hidden_dims]
            )
        blocks = config.stage_blocks()
        self._position_kinds = [block.pos_emb_type for block in blocks]
        self.pos_embs = nn.ModuleList()
        for block, dim, seq_len in zip(blocks, self.hidden_dims, self.seq_lens, strict=True):
            sizes = (dim, seq_len) if block.pos_emb_type == "rope" else (seq_len, dim)
            self.pos_embs.append(_POSITIONS[block.pos_emb_type](*sizes))  # Identity takes any
        self.token_embs_rev = build_token_embeddings(
            self.hidden_dims, self.seq_lens, config.num_tokens, config.pad_token_id
        )
        self.stage_models = nn.ModuleList()
        self.to_next_stage_proj = nn.ModuleList()
        for n, (block, dim) in enumerate(zip(blocks, self.hidden_dims, strict=True)):
            layers = config.num_layers[n]
            self.stage_models.append(block.to_model(model_dim=dim, num_layers=layers))
            projection: nn.Module = nn.Identity()
            if n + 1 < self.num_stages:
                next_len, next_dim = self.seq_lens[n + 1], self.hidden_dims[n + 1]
                projection = nn.Sequential(
                    nn.Identity(),  # Keeps the Linear at the index that checkpoints name.
                    nn.Linear(dim, next_len * next_dim),
                    nn.Unflatten(-1, (next_len, next_dim)),
                )
            self.to_next_stage_proj.append(projection)
        self.to_logits = nn.Linear(self.hidden_dims[-1], config.num_tokens)
        self.register_load_state_dict_pre_hook(_migrate_before_load)
        self.register_load_state_dict_post_hook(_compute_what_is_not_saved)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("packed_weights", None)  # which copies pack for themselves
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed_weights = {}

    # -- What the stages are made of -------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters; of the logits' layer, should they differ and it have one."""
        weight = getattr(self.to_logits, "weight", None)
        return (weight if isinstance(weight, Tensor) else next(self.parameters())).dtype

    @property
    def context_size(self) -> int:
        """Bytes of the configured context, the product of ``seq_lens``."""
        return math.prod(self.seq_lens)

    @property
    def max_length(self) -> int | None:
        """Bytes the hierarchy can take, or None: only fixed positions of stage 1 limit them."""
        return self.context_size if self._fixed_first else None

    @property
    def _fixed_first(self) -> bool:
        return self._position_kind(0) == "fixed"

    def _position_kind(self, stage: int) -> str | None:
        kind = self._position_kinds[stage]
        return None if kind is None or type(self.pos_embs[stage]) is nn.Identity else kind

    def rotates_itself(self, stage: int) -> bool:
        """Whether a stage's rotary positions are a module to call: not as built, or hooked."""
        return self._position_kind(stage) == "rope" and not is_plain(self.pos_embs[stage], RoPE)

    def positions(self, stage: int, first: int, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Fixed positions ``(count, D_n)`` or rotation ``(count, D_n / 2, 2)`` of a stage."""
        kind = self._position_kind(stage)
        if kind is None:
            return None, None
        module: Any = self.pos_embs[stage]
        if kind == "fixed" and is_plain(module, nn.Embedding):
            return module.weight[first : first + count], None
        if kind == "fixed":
            return module(torch.arange(first, first + count, device=self.device)), None
        return None, module.rotation(first, count)

    def add_positions(self, stage: int, x: Tensor, first: int | Tensor = 0) -> Tensor:
        """Add a stage's positions, from ``first`` on, to its token embeddings ``(B, S, D_n)``.

        ``first`` is one for all rows, or that of each, ``(B,)`` int64.
        """
        kind = self._position_kind(stage)
        if kind is None:
            return x
        if isinstance(first, Tensor) or self.rotates_itself(stage):
            firsts = torch.as_tensor(first, device=x.device).reshape(-1, 1)
            indices = (firsts + torch.arange(x.shape[1], device=x.device)).expand(x.shape[:2])
            module: Any = self.pos_embs[stage]
            if kind == "fixed":
                return x + module(indices)
            return module(x.unsqueeze(2), input_pos=indices).squeeze(2)
        positions, rotation = self.positions(stage, first, x.shape[1])
        if positions is not None:
            return x + positions
        return x if rotation is None else rotate_pairs(x, rotation)

    def local_tokens(self, ids: Tensor) -> StageTokens:
        """The local stage's token embeddings, ids ``(rows, P_N)``: its table, where that is one."""
        local: Any = self.token_embs_rev[0]
        if is_plain(local, LocalTokenEmbedding):
            table = local.embedding
            if is_plain(table, nn.Embedding) and table.padding_idx == self.pad_token_id:
                return table.weight, ids
        return local(ids), None

    def embed_patches(
        self, stage: int, ids: Tensor, num_patches: int, project: Projection | None = None
    ) -> Tensor:
        """Token embeddings of an upper stage, ids ``(B, L)`` -> ``(B, num_patches, D_n)``.

        ``project`` stands in for the embedding's linear layer.
        """
        return self.token_embs_rev[self.num_stages - 1 - stage](ids, num_patches, project)

    @property
    def local_table(self) -> Tensor:
        """The local stage's embedding table ``(V, D_N)``."""
        table: Tensor = self.token_embs_rev[0].embedding.weight  # type: ignore[union-attr,assignment]
        return table

    def project_context(self, stage: int, attended: Tensor) -> Tensor:
        """Context for stage n + 1, ``(rows, S, D_n) -> (rows * S, P_{n+1}, D_{n+1})``."""
        projection: Any = self.to_next_stage_proj[stage]
        return apply_in_order(projection, attended).flatten(0, 1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the local stage's output, ``(.., D_N) -> (.., V)``."""
        return apply(self.to_logits, hidden)

    def parts_of_patches(
        self, stage: int
    ) -> tuple[nn.Embedding, nn.LayerNorm, nn.Linear, nn.LayerNorm, nn.Linear]:
        """What embeds an upper stage's patches, in order, and what projects its context."""
        embedding: Any = self.token_embs_rev[self.num_stages - 1 - stage]
        _, flat_norm, project, norm = embedding._post
        projection: Any = self.to_next_stage_proj[stage]
        return embedding.embedding, flat_norm, project, norm, projection[1]

    def parts_beside(self, stage: int) -> Iterator[Part]:
        """What embeds a stage's tokens, and gives the context or the logits, as built."""
        embedding = self.token_embs_rev[self.num_stages - 1 - stage]
        if stage + 1 < self.num_stages:
            yield from parts_of(embedding, PatchTokenEmbedding)
            projection: Any = self.to_next_stage_proj[stage]
            yield projection, nn.Sequential
            yield from parts_in(projection, nn.Identity, nn.Linear, nn.Unflatten)
        else:
            yield from parts_of(embedding, LocalTokenEmbedding)
            yield self.to_logits, nn.Linear
        yield self.pos_embs[stage], _POSITIONS[self._position_kind(stage)]

    def run_stage(self, stage: int, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """Run a stage model on ``(rows, S, D_n)``, in recomputed chunks where configured."""
        model: Any = self.stage_models[stage]
        chunks, config = self.checkpoint_chunks[stage], self.config
        if is_transformed():  # recomputation is not made for that
            chunks = None
        elif stage == 0 and (config.checkpoint_global or config.offload):
            return self._run_global_stage(x, *inputs)
        if getattr(model, "takes_shared_start", False):  # the rows begin with the start token
            model = functools.partial(model, shared_start=True)
        if chunks is None:
            return model(x, *inputs)
        run = with_weights_of_now(self.stage_models[stage], model)
        if self.training:
            run = functools.partial(checkpoint, run, use_reentrant=False)
        parts = [t.chunk(chunks) if t is not None else [None] * chunks for t in (x, *inputs)]
        return torch.cat([run(*part) for part in zip(*parts, strict=True)])

    def _run_on_tokens(
        self, stage: int, tokens: StageTokens, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Output of a stage ``(rows, S, D_n)``; ``mask`` is that of the rows' bytes."""
        raise NotImplementedError

    def _attend(self, tokens: Callable[[int], StageTokens], mask: Tensor | None = None) -> Tensor:
        """Run all stages; returns the local stage's output."""
        context, attended = None, torch.empty(0)
        for stage in range(self.num_stages):
            attended = self._run_on_tokens(stage, tokens(stage), context, mask)
            if stage + 1 < self.num_stages:
                context = self.project_context(stage, self.below_positions(stage, attended))
        return attended

    def _run_global_stage(self, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """Run the most global stage's model, and keep its activations as configured."""
        model: Any = self.stage_models[0]
        if not torch.is_grad_enabled():
            return model(x, *inputs)
        with saved_on_host() if self.config.offload else contextlib.nullcontext():
            if not self.config.checkpoint_global:
                return model(x, *inputs)
            segment = self.config.tile or INFERENCE_TILE
            return run_recomputed(model, x, *inputs, segment=segment)

    # -- Long sequences ----------------------------------------------------------------------------

    def attend(self, stage: int, above: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Run a stage, not 0, below positions of the stage above it: ``(rows, S, D_n)``.

        Args:
            stage: The stage's index.
            above: Output of the stage above at these positions, ``(rows, D_{n-1})``.
            ids: The ids of the positions' bytes, ``(rows, P_n * R_n)``.
            mask: Which of these bytes are attended to, for stages that take a mask.
        """
        context = self.project_context(stage - 1, above[None])
        return self._run_on_tokens(stage, self._tokens(stage, ids), context, mask)

    def below_positions(self, stage: int, attended: Tensor) -> Tensor:
        """What lies below a stage's output ``(rows, S, D_n)``: ``(rows, positions, D_n)``.

        It is the context of the stage below, or the bytes whose logits the last stage gives.
        """
        raise NotImplementedError

    def tile_for(self, num_bytes: int) -> int | None:
        """Positions of a tile in a pass over so many bytes, None for a pass without tiles."""
        if is_transformed():
            return None
        tile = self.config.tile
        if tile is None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            tile = INFERENCE_TILE
        return None if tile is None or num_bytes <= tile else tile

    def mean_loss(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean of so many losses from their sum; 0, with a gradient, if there are none."""
        return (total / count.clamp(min=1)).to(self.dtype)

    def _tokens(self, stage: int, ids: Tensor) -> StageTokens:
        """Token embeddings of a stage's rows of whole patches, ids ``(rows, S * R_n)``."""
        if stage + 1 == self.num_stages:
            return self.local_tokens(ids)
        return self.embed_patches(stage, ids, ids.shape[1] // self.patch_sizes[stage]), None

    def _pad(self, per_byte: Tensor, value: float) -> Tensor:
        """Pad ``(B, L)`` on the right to whole patches of stage 1."""
        length, patch_size = per_byte.shape[1], self.patch_sizes[0]
        missing = (length + patch_size - 1) // patch_size * patch_size - length
        return nn.functional.pad(per_byte, (0, missing), value=value)

    # -- Inputs ------------------------------------------------------------------------------------

    def _check_ids(self, input_ids: Tensor | None) -> Tensor:
        ids = check_token_ids("input_ids", input_ids, self.num_tokens)
        check_hierarchy_shape("input_ids", ids.shape, self.seq_lens, fixed_first=self._fixed_first)
        return ids

    def _tokens_of_ids(self, ids: Tensor) -> Callable[[int], StageTokens]:
        """Token embeddings per stage of flat ids ``(B, L)``, padded to whole patches of stage 1."""
        padded = self._pad(ids, self.pad_token_id)

        def tokens(stage: int) -> StageTokens:
            if stage == 0:
                return self._tokens(0, padded)
            row = self.seq_lens[stage] * self.patch_sizes[stage]
            return self._tokens(stage, padded.reshape(len(ids) * (padded.shape[1] // row), row))

        return tokens

    def _tokens_of_embeddings(
        self, embeddings: Tensor | Sequence[Tensor]
    ) -> Callable[[int], StageTokens]:
        """Token embeddings per stage, from those of the bytes or from one tensor per stage."""
        check_embeddings(embeddings, self.hidden_dims, self.seq_lens, fixed_first=self._fixed_first)
        if isinstance(embeddings, Tensor) and self.num_stages > 1:
            warnings.warn(
                "one tensor as inputs_embeds replaces the embedding tables of all stages; to "
                "repeat what input_ids gives, pass one tensor per stage",
                UserWarning,
                stacklevel=5,  # who called the module
            )

        def tokens(stage: int) -> StageTokens:
            reverse = self.num_stages - 1 - stage
            if not isinstance(embeddings, Tensor):
                embedded = embeddings[reverse]
            else:
                of_bytes = embeddings
                if reverse:  # (B, P_1', .., P_n, R_n, D_N)
                    of_bytes = embeddings.flatten(stage + 2, -2)
                embed: Any = self.token_embs_rev[reverse]
                embedded = embed.from_embeddings(of_bytes)
            return embedded.flatten(0, -3), None

        return tokens

    # -- Checkpoints -------------------------------------------------------------------------------

    @staticmethod
    def migrate_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same weights under the current names, from those of any release since 0.4.0."""
        return migrate_embedding_keys(state_dict)


def _migrate_before_load(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    migrated = migrate_embedding_keys(state_dict, prefix)
    state_dict.clear()
    state_dict.update(migrated)


def _compute_what_is_not_saved(model: Any, _: object) -> None:
    """A model that was made on meta may have been assigned weights, and has no angles yet."""
    for positions in model.pos_embs:
        if isinstance(positions, RoPE) and positions.theta.is_meta:
            positions.to_empty(device=model.device)


def parts_of(module: Any, kind: type[nn.Module]) -> Iterator[Part]:
    """A module that lists what is in it, and that, as built."""
    yield module, kind  # first: another module has no parts of its own
    yield from module.parts()
