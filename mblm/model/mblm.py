"""MBLM, the causal hierarchy: forward pass, loss, and the faces of incremental generation."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mblm.model.causal import CausalHierarchy
from mblm.model.checks import check_config, check_inputs, check_like_ids
from mblm.model.config import MBLMModelConfig, MBLMReturnType
from mblm.model.encoder import MBLMEncoder
from mblm.model.loss import cross_entropy, losses_per_byte, sum_and_count
from mblm.model.pretrained import PretrainedMixin
from mblm.model.tiled_pass import TiledPass
from mblm.utils.stream import ByteStreamer
from mblm.utils.transforms import decoding, not_compiled

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mblm.inference.generation import Generation
    from mblm.inference.prompt import Prompt
    from mblm.inference.request import Filters, Wishes
    from mblm.inference.score import Score
    from mblm.inference.session import Session
    from mblm.inference.stream import Stream

__all__ = ["MBLM", "MBLMEncoder"]


class MBLM(CausalHierarchy, PretrainedMixin):
    """Multiscale Byte Language Model: a hierarchy of causal stages that models bytes.

    Source: Egli et al., Multiscale Byte Language Models, https://arxiv.org/abs/2502.14553.

    Args:
        cfg: What it is made of. Weights are drawn from torch's default generator.

    Raises:
        TypeError: ``cfg`` is no `mblm.MBLMModelConfig`.
    """

    config_class = MBLMModelConfig

    def __init__(self, cfg: MBLMModelConfig) -> None:
        check_config("cfg", cfg, MBLMModelConfig)
        super().__init__(cfg)
        self.pretrained_config = cfg

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | Sequence[Tensor] | None = None,
        return_type: MBLMReturnType = MBLMReturnType.LOSS,
        loss_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One pass over whole sequences.

        Args:
            input_ids: Token ids, any integer dtype, flat ``(B, L)`` or nested
                ``(B, P_1', P_2, .., P_N)``. Flat ids are padded to whole patches of stage 1.
                ``(B, 0)`` gives logits of the first byte ``(B, 1, V)``, for any ``return_type``.
            inputs_embeds: Instead of ids, embeddings of the bytes ``(B, P_1', .., P_N, D_N)`` for
                all stages, or one tensor per stage ``(B, P_1', .., P_n, D_n)``, the local stage's
                first. Only for ``HIDDEN_STATE``.
            return_type: What to return. Default ``LOSS``.
            loss_mask: Weight of each byte's loss, the shape of ``input_ids``. Default: all 1.

        Returns:
            ``LOGITS``: ``(B, L, V)``, row l predicts byte l + 1; for nested ids
            ``(B, P_1', .., 1 + P_N, V)`` with the start positions.
            ``LOSS``: scalar. ``LOSS_LOGITS``: both.
            ``HIDDEN_STATE``: the local stage's output ``(B, L, D_N)``, nested for nested input.

        Raises:
            TypeError: A dtype that is none of token ids or embeddings, or an unknown return type.
            ValueError: Bad shapes, ids outside the vocabulary, more bytes than the context.
        """
        check_inputs(input_ids, inputs_embeds, return_type)
        if inputs_embeds is not None:
            attended = self._attend(self._tokens_of_embeddings(inputs_embeds))
            local = inputs_embeds if isinstance(inputs_embeds, Tensor) else inputs_embeds[0]
            return attended[:, 1:].reshape(local.shape)

        nested_ids = self._check_ids(input_ids)
        check_like_ids("loss_mask", loss_mask, nested_ids)
        ids = nested_ids.flatten(1)
        if ids.shape[1] == 0:
            return self.empty_logits(ids.shape[0])

        tile = self.tile_for(ids.numel())
        if tile is not None:
            return self._forward_in_tiles(tile, nested_ids, return_type, loss_mask)
        attended = self._attend(self._tokens_of_ids(ids))
        if return_type == MBLMReturnType.HIDDEN_STATE:
            return self._unpatch(attended[:, 1:], nested_ids)
        logits = self.compute_logits(attended)  # (rows, 1 + P_N, V)
        if return_type == MBLMReturnType.LOGITS:
            return self._logits_like(logits, nested_ids)
        loss = cross_entropy(logits, *self._targets(ids, loss_mask, logits), self.pad_token_id)
        if return_type == MBLMReturnType.LOSS:
            return loss
        return loss, self._logits_like(logits, nested_ids)

    @decoding
    def generate(
        self,
        prime: "Prompt | None" = None,
        stream: ByteStreamer | None = None,
        num_tokens_to_generate: int | None = None,
        end_of_gen_token_id: int | None = -1,
        temperature: float = 1.0,
        filter_thres: float = 1.0,
        enable_progress: bool = True,
        *,
        weights: str = "float32",
        **wishes: "Unpack[Filters]",
    ) -> Tensor:
        """Generate bytes after a prompt, as the model's mode says: call ``model.eval()`` first.

        Args:
            prime: The prompt: bytes, text (UTF-8), or token ids of any integer dtype, ``(L,)`` or
                ``(1, L)``, as a list, an array or a tensor. Default: an empty one.
            stream: Where bytes go, every 20 ms those that have come. When its reader is gone (a
                broken pipe or connection), generation ends and what there is is returned. Default:
                none.
            num_tokens_to_generate: How many bytes to generate. Default: up to the context,
                ``prod(seq_lens)`` in all.
            end_of_gen_token_id: Generation ends after this id, which is kept. Default: none; one
                outside the vocabulary never comes.
            temperature: Divides the logits, >= 0; 0 takes the likeliest byte. Default 1.
            filter_thres: Keeps the highest ``max(int((1 - filter_thres) * V), 1)`` logits, in
                [0, 1], where none of ``top_k``, ``top_p`` and ``min_p`` is given. Default 1, the
                likeliest byte alone.
            enable_progress: Show a progress bar where there is no stream. Default True.
            weights: What compiled code reads the weights of linear layers as, ``"float32"``,
                ``"bfloat16"`` or ``"int8"``; see `Session`. Default ``"float32"``.
            wishes: ``top_k``, ``top_p``, ``min_p``, ``stop``, ``seed``, ``generator``,
                ``constraint``, ``logits_processor``, ``draft``; see
                `mblm.inference.request.Filters`. Default: none.

        Returns:
            The prompt followed by what was generated, ids ``(L + generated,)`` int64 on the model's
            device.

        Raises:
            TypeError, ValueError: Bad input, a prompt longer than the context, or NaN weights;
                before anything is generated.
            BaseException: What is raised on the way, by the stream or by Ctrl-C, has the prompt and
                all that was chosen as its attribute ``ids``.
        """
        from mblm.inference.generate import generate

        with torch.inference_mode():
            return generate(
                self,
                prime,
                stream,
                wishes,
                max_bytes=num_tokens_to_generate,
                end_token_id=end_of_gen_token_id,
                temperature=temperature,
                filter_thres=filter_thres,
                enable_progress=enable_progress,
                weights=weights,
            )

    @decoding
    def generate_batch(
        self,
        prompts: Iterable["Prompt"],
        *,
        max_rows: int = 64,
        seeds: int | Sequence[int | None] | None = None,
        on_bytes: Callable[[int, bytes], object] | None = None,
        on_result: Callable[[int, "Generation"], object] | None = None,
        weights: str = "float32",
        enable_progress: bool = True,
        **wishes: Any,
    ) -> list["Generation"]:
        """Generate after many prompts: a row that ends makes room for the next prompt.

        Each result is what `generate` gives for the prompt and the seed alone: the same ids, and
        in compiled code the same log-probabilities to the last bit.

        Args:
            prompts: Bytes, texts or token ids, of any lengths. An iterator is read as rows come
                free; those of a list are checked before anything runs.
            max_rows: How many rows there are at most. Default 64.
            seeds: Each prompt draws its numbers from a generator of its own. Default: the n-th
                prompt's seed is n more than a number that the call draws from torch's default
                generator.
            on_bytes: Called with a prompt's index and its next bytes, as they come.
            on_result: Called with a prompt's index and what was generated, when it is over. What it
                raises ends all.
            weights, enable_progress: As of `generate`.
            wishes: As of `stream`, but ``seed`` and ``generator``, each one value or a list with
                one for each prompt.

        Returns:
            One for each prompt, in their order.

        Raises:
            TypeError, ValueError: A bad argument, or a list of another length; nothing has run.
            BaseException: What goes wrong for one prompt (a bad one that an iterator gives, a
                callback or a processor that raises, no memory for one row alone) ends that one, and
                is raised when all others are over. Anything else, Ctrl-C too, ends all. The error's
                ``generations`` are those of all prompts that were read, with what was chosen.
        """
        from mblm.inference.batch import generate_batch

        return generate_batch(
            self,
            prompts,
            max_rows=max_rows,
            seeds=seeds,
            on_bytes=on_bytes,
            on_result=on_result,
            weights=weights,
            enable_progress=enable_progress,
            **wishes,
        )

    def stream(
        self,
        prompt: "Prompt",
        *,
        text: bool = False,
        weights: str = "float32",
        **wishes: "Unpack[Wishes]",
    ) -> "Stream":
        """Generate bytes or text to iterate over as they come; see `mblm.inference.stream.Stream`.

        Args:
            prompt: Bytes, text or token ids, as of `generate`.
            text: Give text, whole characters only, instead of bytes. Default False.
            weights: As of `generate`.
            wishes: As `generate`'s, and ``max_bytes``, ``end_token_id``, ``temperature``,
                ``filter_thres``, ``log_probs``; see `mblm.inference.request.Wishes`.

        Raises:
            TypeError, ValueError: Bad input; see `Stream`.
        """
        from mblm.inference.stream import Stream

        return Stream(self, prompt, text, weights, **wishes)

    @decoding
    def score(
        self,
        data: "Prompt | Sequence[Prompt]",
        given: "Prompt | Sequence[Prompt]" = b"",
        *,
        length: int | None = None,
        stride: int | None = None,
        batch_bytes: int = 1 << 16,
    ) -> "Score | list[Score]":
        """Tell how likely the model finds bytes, each given those before it.

        A byte's probability is what a `Session` tells after the bytes before it, up to rounding. So
        the first byte of a text with nothing given is predicted as `generate` does it, by the
        logits of the empty input, and not as the loss does: see `docs/guide-score.md`. The model's
        mode is left: call ``model.eval()`` first.

        Texts longer than the context are scored in windows of ``length`` bytes, each byte once,
        with at least ``length - stride`` bytes before it except where the text begins. A model
        without a limit whose most global stage is recurrent, a Mamba, takes a text of any length as
        one sequence, unless there is a length or a stride. Memory beyond the texts and their scores
        follows ``batch_bytes`` and ``length``.

        Args:
            data: A text: bytes, a string (UTF-8), or token ids as a tensor or an array ``(L,)`` or
                ``(1, L)`` or a list of integers. Or a list of texts, scored in batches, each as if
                alone up to rounding.
            given: What comes before the text and is not scored; of what is longer than a window
                only the end. One for all texts, or a list of one for each. Default: nothing.
            length: Bytes of a window, at most ``max_length``. Default: ``context_size``, or no
                windows; see above.
            stride: How many bytes of a window are scored, from 1 to ``length``. Default: half of
                it, so that every byte has at least half a context before it. Only the most global
                stage computes what is not scored; ``stride=length`` is fastest.
            batch_bytes: Bytes that are taken in together; a window at least. Default 65,536.

        Returns:
            A score, or a list of one for each text. A text without bytes has 0 bits, and NaN per
            byte.

        Raises:
            TypeError, ValueError: Bad input, such as an id outside the vocabulary; before anything
                is scored.
        """
        from mblm.inference.score import score

        return score(self, data, given, length=length, stride=stride, batch_bytes=batch_bytes)

    def session(self, batch_size: int = 1, *, weights: str = "float32") -> "Session":
        """Start incremental decoding of ``batch_size`` sequences; see `Session`.

        Args:
            batch_size: Sequences side by side. Default 1.
            weights: As of `generate`.
        """
        from mblm.inference.session import Session

        return Session(self, batch_size, weights=weights)

    # -- The same in tiles -------------------------------------------------------------------------

    @not_compiled
    def _forward_in_tiles(
        self, tile: int, nested_ids: Tensor, return_type: MBLMReturnType, loss_mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward` of checked ids, at least one."""
        ids = nested_ids.flatten(1)
        if return_type == MBLMReturnType.LOSS:
            return self.mean_loss(*self._loss_sum(tile, ids, loss_mask))
        padded = self._pad(ids, self.pad_token_id)
        tiles = TiledPass(self, tile, self.pad_token_id)
        attended = self.attend_global(padded, tiles)
        if return_type == MBLMReturnType.HIDDEN_STATE:
            hidden = tiles.outputs(lambda local: local[:, 1:], attended, padded)
            return self._unpatch(hidden, nested_ids)
        logits = tiles.outputs(self.compute_logits, attended, padded)  # (rows, 1 + P_N, V)
        if return_type == MBLMReturnType.LOGITS:
            return self._logits_like(logits, nested_ids)
        total, count = tiles.loss_of_logits(logits, *self._targets(ids, loss_mask, logits))
        return self.mean_loss(total, count), self._logits_like(logits, nested_ids)

    def _loss_sum(self, tile: int, ids: Tensor, loss_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum and count of the losses of checked ids ``(B, L)`` that are not zero."""
        weights = None if loss_mask is None else loss_mask.flatten(1)

        def shift(per_byte: Tensor, fill: float) -> Tensor:
            """What the logits of each byte predict, ``(B, L) -> (B, S * R_1)``."""
            return self._pad(nn.functional.pad(per_byte[:, 1:], (0, 1), value=fill), fill)

        padded, targets = self._pad(ids, self.pad_token_id), shift(ids, self.pad_token_id)
        later_weights = None if weights is None else shift(weights, 0)
        tiles = TiledPass(self, tile, self.pad_token_id)
        attended = self.attend_global(padded, tiles)
        total, count = tiles.loss(attended, padded, targets, weights=later_weights)
        first_total, first_count = sum_and_count(self._losses_of_first(ids, weights))
        return first_total + total, first_count + count

    def _losses_of_first(self, ids: Tensor, weights: Tensor | None) -> Tensor:
        """Losses of the first bytes of ``ids (B, L)``, which the local start token predicts."""
        start = self.start_token(self.num_stages - 1, len(ids))[:, None]
        logits = self.compute_logits(self.stage_models[-1](start))  # (B, 1, V)
        weights = None if weights is None else weights[:, :1]
        return losses_per_byte(logits, ids[:, :1], weights, self.pad_token_id)

    # -- Between the rows of the local stage and the bytes of a sequence ---------------------------

    def _unpatch(self, local: Tensor, ids: Tensor) -> Tensor:
        """Local rows ``(rows, P_N, X)`` to one row per byte of ``ids``."""
        if ids.ndim > 2:
            return local.reshape(*ids.shape, -1)
        return local.reshape(ids.shape[0], -1, local.shape[-1])[:, : ids.shape[1]]

    def _logits_like(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits ``(rows, 1 + P_N, V)`` per byte of flat ids, or nested with the start rows."""
        if ids.ndim > 2:
            return logits.reshape(*ids.shape[:-1], *logits.shape[-2:])
        return self._unpatch(logits[:, 1:], ids)

    def _targets(
        self, ids: Tensor, loss_mask: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What each row of logits ``(rows, 1 + P_N, V)`` predicts, and its weight."""
        targets = self._arrange(ids, logits.shape[:2], fill=self.pad_token_id)
        if loss_mask is None:
            return targets, None
        return targets, self._arrange(loss_mask.flatten(1), logits.shape[:2], fill=0)

    def _arrange(self, per_byte: Tensor, local_shape: torch.Size, fill: float) -> Tensor:
        """Put values per byte ``(B, L)`` where the byte is predicted, ``(rows, 1 + P_N)``.

        Row i of a patch predicts its byte i + 1, counted from 1; the last row predicts the first
        byte of the next patch. Start rows predict nothing, but the first patch's predicts byte 0.
        """
        batch_size, length = per_byte.shape
        patches, positions = local_shape[0] // batch_size, local_shape[1] - 1
        # No writing in place, which torch.func.linearize would lose, and no torch.cat, for which
        # autocast on a CPU refuses masks of another half precision.
        pad = nn.functional.pad
        later = pad(per_byte[:, 1:], (0, patches * positions - length + 1), value=fill)
        arranged = pad(later.reshape(batch_size, patches, positions), (1, 0), value=fill)
        is_first = torch.arange(arranged[0].numel(), device=per_byte.device) == 0
        first = is_first.view(patches, 1 + positions)
        return torch.where(first, per_byte[:, :1, None], arranged).view(local_shape)
