"""MBLMEncoder, the bidirectional hierarchy for masked language modeling."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mblm.model.checks import check_config, check_inputs, check_like_ids
from mblm.model.config import MaskReduceStrat, MBLMEncoderModelConfig, MBLMReturnType
from mblm.model.hierarchy import Hierarchy, StageTokens
from mblm.model.loss import cross_entropy
from mblm.model.pretrained import PretrainedMixin
from mblm.model.tiled_pass import TiledPass
from mblm.utils.checks import check_id_dtype, check_token_ids
from mblm.utils.transforms import not_compiled

IGNORED_LABEL = -100


class MBLMEncoder(Hierarchy, PretrainedMixin):
    """A hierarchy of bidirectional stages: no start tokens, context added to every position.

    Args:
        config: What it is made of. Weights are drawn from torch's default generator.

    Raises:
        TypeError: ``config`` is no `mblm.MBLMEncoderModelConfig`.
        ValueError: A stage model whose ``forward`` does not take ``(x, attention_mask)``.
    """

    config_class = MBLMEncoderModelConfig

    def __init__(self, config: MBLMEncoderModelConfig) -> None:
        check_config("config", config, MBLMEncoderModelConfig)
        super().__init__(config.mblm_config, start_tokens=False)
        self.pretrained_config = config
        self.mask_token_id = config.mask_token_id
        self.reduce_strat = config.mask_reduce_strat
        for number, stage in enumerate(self.stage_models, start=1):
            _check_takes_mask(number, stage)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        return_type: MBLMReturnType = MBLMReturnType.LOSS_LOGITS,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One pass over whole sequences.

        Args:
            input_ids: Token ids ``(B, L)``, L >= 1, or nested ``(B, P_1', P_2, .., P_N)``.
            inputs_embeds: Instead of ids, embeddings as in `MBLM.forward`. Only for
                ``HIDDEN_STATE``.
            attention_mask: Which bytes are attended to, bool, True = attend, the shape of the ids
                (of the bytes' embeddings without their last dimension). Default: all.
            labels: The true token ids, the shape of ``input_ids``; needed for a loss. Bytes that
                are not attended to do not count.
            loss_mask: Weight of each byte's loss, the shape of ``input_ids``. Default: all 1.
            return_type: What to return. Default ``LOSS_LOGITS``.

        Returns:
            ``HIDDEN_STATE`` ``(B, L, D_N)``, ``LOGITS`` ``(B, L, V)`` (nested for nested input),
            ``LOSS`` a scalar, or ``LOSS_LOGITS`` both.

        Raises:
            TypeError: A dtype that is none of token ids, embeddings or a bool mask, or an unknown
                return type.
            ValueError: Bad shapes, ids outside the vocabulary, more bytes than the context, or
                labels missing for a loss.
        """
        check_inputs(input_ids, inputs_embeds, return_type)
        with_loss = return_type in (MBLMReturnType.LOSS, MBLMReturnType.LOSS_LOGITS)
        if with_loss and labels is None:
            raise ValueError(f"labels: a loss needs labels, got None with {return_type!r}")
        if attention_mask is not None:
            kind = getattr(attention_mask, "dtype", type(attention_mask).__name__)
            if kind != torch.bool:
                raise TypeError(f"attention_mask: expected a tensor of torch.bool, got {kind}")

        if inputs_embeds is not None:
            return self._hidden_of_embeddings(inputs_embeds, attention_mask)

        nested_ids = self._check_ids(input_ids)
        if nested_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected at least one byte, got {tuple(nested_ids.shape)}"
            )
        given = {"attention_mask": attention_mask, "labels": labels, "loss_mask": loss_mask}
        for name, tensor in given.items():
            check_like_ids(name, tensor, nested_ids)

        ids = nested_ids.flatten(1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            mask = attention_mask.flatten(1)
        targets = None
        if labels is not None and with_loss:
            targets = self._targets(labels.flatten(1), mask)
        weights = None if loss_mask is None else loss_mask.flatten(1)
        tile = self.tile_for(ids.numel())
        if tile is not None:
            return self._forward_in_tiles(tile, nested_ids, mask, targets, weights, return_type)
        attended = self._attend(self._tokens_of_ids(ids), self._pad(mask, False))
        hidden = attended.reshape(ids.shape[0], -1, attended.shape[-1])[:, : ids.shape[1]]
        if return_type == MBLMReturnType.HIDDEN_STATE:
            return hidden.reshape(*nested_ids.shape, -1)
        logits = self.compute_logits(hidden)
        nested_logits = logits.reshape(*nested_ids.shape, -1)
        if targets is None:
            return nested_logits
        loss = cross_entropy(logits, targets, weights, IGNORED_LABEL)
        return loss if return_type == MBLMReturnType.LOSS else (loss, nested_logits)

    @not_compiled
    def _forward_in_tiles(
        self,
        tile: int,
        nested_ids: Tensor,
        mask: Tensor,
        targets: Tensor | None,
        weights: Tensor | None,
        return_type: MBLMReturnType,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward` of checked ids; ``mask``, ``targets`` and ``weights`` are flat."""
        ids = nested_ids.flatten(1)
        padded, mask = self._pad(ids, self.pad_token_id), self._pad(mask, False)
        tiles = TiledPass(self, tile, IGNORED_LABEL)
        attended = self._run_on_tokens(0, tiles.global_tokens(padded), None, mask)
        if targets is not None:
            targets = self._pad(targets, IGNORED_LABEL)
            weights = None if weights is None else self._pad(weights, 0)
            if return_type == MBLMReturnType.LOSS:
                return self.mean_loss(*tiles.loss(attended, padded, targets, mask, weights))

        is_hidden = return_type == MBLMReturnType.HIDDEN_STATE
        head = nn.Identity() if is_hidden else self.compute_logits
        outputs = tiles.outputs(head, attended, padded, mask)  # (rows, P_N, D_N or V)
        per_byte = outputs.reshape(*padded.shape, -1)[:, : ids.shape[1]]
        nested = per_byte.reshape(*nested_ids.shape, -1)
        if targets is None:
            return nested
        return self.mean_loss(*tiles.loss_of_logits(outputs, targets, weights)), nested

    def _targets(self, labels: Tensor, mask: Tensor) -> Tensor:
        """Labels of the bytes that count, of the others one that does not."""
        labels = check_id_dtype("labels", labels)
        uncounted = ~mask | (labels == IGNORED_LABEL)
        check_token_ids("labels", labels.masked_fill(uncounted, 0), self.num_tokens)
        return labels.masked_fill(uncounted, IGNORED_LABEL)

    def _hidden_of_embeddings(
        self, inputs_embeds: Tensor | Sequence[Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        tokens = self._tokens_of_embeddings(inputs_embeds)
        local = inputs_embeds if isinstance(inputs_embeds, Tensor) else inputs_embeds[0]
        if attention_mask is None:
            attention_mask = torch.ones(local.shape[:-1], dtype=torch.bool, device=local.device)
        elif attention_mask.shape != local.shape[:-1]:
            raise ValueError(
                f"attention_mask: expected shape {tuple(local.shape[:-1])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = self._pad(attention_mask.flatten(1), False)
        return self._attend(tokens, mask).reshape(local.shape)

    def _run_on_tokens(
        self, stage: int, tokens: StageTokens, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Output of a stage ``(rows, P_n, D_n)``; the mask is needed."""
        assert mask is not None
        embeddings, ids = tokens
        x = (
            embeddings
            if ids is None
            else nn.functional.embedding(ids, embeddings, self.pad_token_id)
        )
        x = self.add_positions(stage, x)
        if context is not None:
            x = x + context
        return self.run_stage(stage, x, self._mask_at(stage, mask, x.shape[1]))

    def below_positions(self, stage: int, attended: Tensor) -> Tensor:
        """See `Hierarchy.below_positions`: all."""
        return attended

    def _mask_at(self, stage: int, mask: Tensor, seq_len: int) -> Tensor:
        """The mask of a stage's rows ``(rows, seq_len)``, from that of all of their bytes."""
        of_bytes = mask.reshape(-1, seq_len, self.patch_sizes[stage])
        if self.reduce_strat == MaskReduceStrat.ANY:
            return of_bytes.any(-1)
        return of_bytes.all(-1)


def _check_takes_mask(number: int, stage: nn.Module) -> None:
    try:
        inspect.signature(stage.forward).bind(None, None)
    except TypeError:
        raise ValueError(
            f"block: stage {number} is a {type(stage).__name__}, which takes no attention mask; an "
            "encoder needs stages that do, such as block_type: transformerEncoder"
        ) from None
