"""The configuration of a model as Hugging Face's libraries read and write it."""

import math
from typing import Any

from transformers import PreTrainedConfig

from mblm.model.config import MBLMModelConfig


class MBLMConfig(PreTrainedConfig):
    """The settings of an `mblm.MBLMModelConfig`, under the same names.

    Attributes:
        block: The settings of one block for all stages, or of one per stage.
        bits_per_byte: What the model is known to need, for its card. Default: not known.

    Raises:
        ValueError: The settings are none of a model.
    """

    model_type = "MBLM"  # as in the folders that `mblm.MBLM.save_pretrained` writes
    attribute_map = {"vocab_size": "num_tokens"}  # noqa: RUF012

    num_tokens: int
    pad_token_id: int
    hidden_dims: list[int]
    num_layers: list[int]
    seq_lens: list[int]
    block: dict[str, Any] | list[dict[str, Any]]
    train_checkpoint_chunks: list[int] | None = None
    tile: int | None = None
    checkpoint_global: bool = False
    offload: bool = False
    bits_per_byte: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("config_id", None)  # of the weights beside it, which change
        self.mblm_config()
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: MBLMModelConfig, **kwargs: Any) -> "MBLMConfig":
        """The same settings, and those of Hugging Face's own as ``kwargs``."""
        return cls(**config.model_dump(mode="json"), **kwargs)

    def mblm_config(self) -> MBLMModelConfig:
        """The same settings for an `mblm.MBLM`."""
        return MBLMModelConfig(
            **{name: getattr(self, name) for name in MBLMModelConfig.model_fields}
        )

    @property
    def hidden_size(self) -> int:
        """Width of the local stage, whose tokens are the bytes."""
        return self.hidden_dims[-1]

    @property
    def max_position_embeddings(self) -> int | None:
        """Bytes of the context where fixed positions limit it; None: any number."""
        config = self.mblm_config()
        is_limited = config.stage_blocks()[0].pos_emb_type == "fixed"
        return math.prod(config.seq_lens) if is_limited else None

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stages."""
        return sum(self.num_layers)
