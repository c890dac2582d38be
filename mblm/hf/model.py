"""An `mblm.MBLM` as a causal language model of Hugging Face's."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mblm.hf.config import MBLMConfig
from mblm.hf.generation import MBLMGenerationMixin
from mblm.hf.padding import align_left, align_right
from mblm.model.config import MBLMReturnType
from mblm.model.find import SHARDS, WEIGHTS_FILE
from mblm.model.hub import model_card, push_folder
from mblm.model.mblm import MBLM
from mblm.model.pretrained import untied
from mblm.model.tiles import INFERENCE_TILE
from mblm.utils.checks import check_id_dtype, check_token_ids

_NO_LABEL = -100  # the library's


class MBLMForCausalLM(PreTrainedModel, MBLMGenerationMixin):
    """A causal language model of bytes for ``Trainer``, ``pipeline``, peft and ``accelerate``.

    What `save_pretrained` writes is also read by `mblm.MBLM.from_pretrained`, and the other way
    round.

    Args:
        config: Its configuration.
        model: What computes all of it. Default: a new one, with random weights.

    Attributes:
        model: The `mblm.MBLM` that computes all of it.
    """

    config_class = MBLMConfig
    config: MBLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True  # and computes attention so, whatever is asked for
    _no_split_modules = ["MBLM"]  # noqa: RUF012  stages read weights of one another's devices

    def __init__(self, config: MBLMConfig, model: MBLM | None = None) -> None:
        super().__init__(config)
        self.model = MBLM(config.mblm_config()) if model is None else model
        self.post_init()

    @classmethod
    def from_mblm(cls, model: MBLM, **kwargs: Any) -> "MBLMForCausalLM":
        """A model that computes with this one, whose weights it shares.

        Args:
            model: The model.
            **kwargs: Further settings of the `MBLMConfig`, such as ``bits_per_byte``.
        """
        if not isinstance(model, MBLM):
            raise TypeError(f"model: expected an mblm.MBLM, got {type(model).__name__}")
        config = MBLMConfig.of(model.config, dtype=model.dtype, **kwargs)
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.from_pretrained``, but nothing may be missing or elsewhere.

        Raises:
            ValueError: The weights are not all of the model's, or of another shape; or a
                ``device_map`` has them on several devices or on a disk.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        places = getattr(model, "hf_device_map", {})
        if len(set(places.values())) > 1 or "disk" in places.values():
            raise ValueError(
                f"device_map: a model is on one device, which must have room for it, got {places}"
            )
        if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
            raise ValueError(f"{model.name_or_path}: no weights that fit {', '.join(lacking)}")
        model.model._apply(lambda tensor: tensor)  # angles of positions, which are in no file
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``PreTrainedModel.save_pretrained``; tied weights are written under all names."""
        weights = untied(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if is_main_process and any(Path(save_directory).glob(SHARDS)):
            # The one file of an earlier save, which the library leaves and would read.
            Path(save_directory, WEIGHTS_FILE).unlink(missing_ok=True)

    def push_to_hub(
        self, repo_id: str, *, bits_per_byte: float | None = None, **options: Any
    ) -> str:
        """Upload what ``save_pretrained`` writes, with a card; see `mblm.MBLM.push_to_hub`.

        ``bits_per_byte`` is that of the configuration unless it is given.
        """
        if bits_per_byte is None:
            bits_per_byte = self.config.bits_per_byte
        usage = [
            "import mblm.hf  # registers the model",
            "from transformers import pipeline",
            "",
            f'pipeline("text-generation", model="{repo_id}")("The ", max_new_tokens=50)',
        ]
        card = model_card(
            self.model, library="transformers", usage=usage, bits_per_byte=bits_per_byte
        )
        return push_folder(repo_id, self.save_pretrained, card, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """One pass over whole sequences.

        Args:
            input_ids: Token ids, any integer dtype, ``(B, L)``.
            attention_mask: Not 0 where there are bytes, ``(B, L)``; padding is at the ends of rows.
                Default: everywhere.
            labels: The ids that count in the loss, -100 for none, ``(B, L)``. The logits of a byte
                predict the label of the next one, so that the first label does not count.
            num_items_in_batch: What the sum over labels is divided by. Default: how many count; the
                loss is 0 where none does.
            return_dict: False for a tuple. Default: what the configuration says.

        Returns:
            ``loss``, a scalar, if there are labels, and ``logits (B, L, V)``, those at padding
            without meaning.

        Raises:
            TypeError, ValueError: As `mblm.MBLM.forward`; or an argument of other models.
        """
        given = [n for n, v in others.items() if isinstance(v, Tensor) or v not in (None, False)]
        if given:
            raise TypeError(f"{', '.join(given)}: not known to {type(self).__name__}")
        ids, shift = align_left(input_ids, attention_mask)
        logits = self.model(ids, return_type=MBLMReturnType.LOGITS)
        logits = align_right(logits, shift)
        loss = None
        if labels is not None:
            loss = _loss(logits, labels, attention_mask, num_items_in_batch)
        output = CausalLMOutput(loss=loss, logits=logits)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether stages are computed again in the backward pass; see `mblm.MBLMModelConfig`."""
        return self.model.config is not self.model.pretrained_config

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        config: Any = self.model.pretrained_config
        update = {"checkpoint_global": True, "tile": config.tile or INFERENCE_TILE}
        self.model.config = config.model_copy(update=update) if enable else config

    def enable_input_require_grads(self) -> None:
        """Nothing: recomputation here needs no gradient of its inputs."""

    def disable_input_require_grads(self) -> None:
        """Nothing, as `enable_input_require_grads`."""

    def get_input_embeddings(self) -> nn.Module:
        """What embeds the local stage's bytes."""
        local: Any = self.model.token_embs_rev[0]
        return local.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what embeds the local stage's bytes."""
        self.model.token_embs_rev[0].embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """What computes the logits."""
        return self.model.to_logits

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace what computes the logits."""
        self.model.to_logits = value

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        """Refused: every stage embeds the bytes."""
        raise NotImplementedError(
            "the vocabulary of a model is the 256 bytes and its special ids; for more, see "
            "map_extend_embeddings of mblm.utils.io.load_model_state"
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: an `mblm.MBLM` has initialized its weights."""


def _loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None, count: Tensor | int | None
) -> Tensor:
    """Cross entropy of ``logits (B, L, V)`` and the labels ``(B, L)`` one position later."""
    labels = check_id_dtype("labels", labels)
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: expected the shape of input_ids, {tuple(logits.shape[:2])}, got "
            f"{tuple(labels.shape)}"
        )
    targets = labels[:, 1:].to(logits.device)
    if mask is not None:  # the byte after padding is the first of its row
        targets = targets.masked_fill(mask[:, :-1].to(logits.device) == 0, _NO_LABEL)
    counted = targets != _NO_LABEL
    check_token_ids("labels", targets.masked_fill(~counted, 0), logits.shape[-1])
    total = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=_NO_LABEL,
        reduction="sum",
    )
    if count is None:
        count = counted.sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
