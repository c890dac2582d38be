"""Model configurations, what a forward pass returns, and the registry of stage blocks."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from mblm.model.block import StageBlock, StageBlockRegistry
from mblm.model.mamba import MambaBlock
from mblm.model.transformer import TransformerBlock, TransformerEncoderBlock
from mblm.utils.fields import Fields

block_registry = StageBlockRegistry()
for _block in (TransformerBlock, MambaBlock, TransformerEncoderBlock):
    block_registry.register()(_block)


class MBLMReturnType(str, Enum):
    """What a forward pass returns."""

    LOGITS = auto()
    LOSS = auto()
    LOSS_LOGITS = auto()
    HIDDEN_STATE = auto()

    @classmethod
    def check(cls, value: Any) -> None:
        """Refuse what is not one of these."""
        if not isinstance(value, cls):
            raise TypeError(f"return_type: expected a MBLMReturnType, got {value!r}")


class MaskReduceStrat(str, Enum):
    """When a patch counts as attended: if any of its bytes is, or only if all are."""

    ANY = "any"
    ALL = "all"

    def __str__(self) -> str:
        return self.value


class _Config(Fields):
    """A configuration that libraries can read as they read those of Hugging Face's models."""

    def to_dict(self) -> dict[str, Any]:
        """The same as ``model_dump()``."""
        return self.model_dump()

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or ``default`` where there is none of this name."""
        return getattr(self, name) if name in type(self).model_fields else default


class MBLMModelConfig(_Config):
    """Configuration of a hierarchy, from the most global stage to the local one.

    Attributes:
        num_tokens: Size of the vocabulary, V.
        pad_token_id: Id that fills up patches; it is never predicted.
        hidden_dims: Width of each stage, D_1 .. D_N.
        num_layers: Layers of each stage.
        seq_lens: Positions of each stage, P_1 .. P_N. The context is their product.
        train_checkpoint_chunks: For stages 2 .. N, in how many chunks of its batch a stage runs,
            each recomputed in the backward pass. None keeps all activations. A model, not its
            configuration, refuses another number of entries, as in the published package.
        block: One block for all stages, or a list with one block per stage.
        tile: Positions of a stage that are held at once below the most global stage, while a loss
            or its gradient is computed. What a training step keeps of a sequence is then the most
            global stage's activations, L / R_1 positions; the same loss and gradients to rounding,
            in about the same time. None, the default, keeps the activations of all stages.
        checkpoint_global: Whether the most global stage is computed again in the backward pass, in
            layers (Transformers) or segments of ``tile`` positions (stages with a state), so that
            only their inputs are kept. Costs one more forward pass of that stage. Default False.
        offload: Whether what the most global stage keeps for the backward pass goes to the host's
            memory. Costs the transfers. Default False.
    """

    model_config = ConfigDict(protected_namespaces=())

    num_tokens: PositiveInt
    pad_token_id: NonNegativeInt
    hidden_dims: Sequence[PositiveInt] = Field(min_length=1)
    num_layers: Sequence[PositiveInt]
    seq_lens: Sequence[PositiveInt]
    train_checkpoint_chunks: list[PositiveInt] | None
    block: SerializeAsAny[StageBlock] | Sequence[SerializeAsAny[StageBlock]]
    tile: PositiveInt | None = None
    checkpoint_global: bool = False
    offload: bool = False

    @field_validator("block", mode="before")
    @classmethod
    def _parse_block(cls, value: Any) -> Any:
        """Parse what is not yet a block through the registry."""
        if isinstance(value, (list, tuple)):
            return [_parse_stage_block(item) for item in value]
        return _parse_stage_block(value)

    @model_validator(mode="after")
    def _check_stages(self) -> "MBLMModelConfig":
        stages = len(self.hidden_dims)
        problems = [
            f"{name} has {count} entries, hidden_dims has {stages}"
            for name, count in (
                ("num_layers", len(self.num_layers)),
                ("seq_lens", len(self.seq_lens)),
                ("block", len(self.block) if isinstance(self.block, Sequence) else stages),
            )
            if count != stages
        ]
        if self.pad_token_id >= self.num_tokens:
            problems.append(
                f"pad_token_id is {self.pad_token_id}, expected an id below num_tokens = "
                f"{self.num_tokens}"
            )
        blocks = self.stage_blocks()
        for index, (dim, block) in enumerate(zip(self.hidden_dims, blocks, strict=False)):
            if block.pos_emb_type == "rope" and dim % 2:
                problems.append(f"hidden_dims[{index}] is {dim}, rope positions need an even width")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @field_serializer("block")
    def _serialize_block(
        self, block: StageBlock | Sequence[StageBlock], info: SerializationInfo
    ) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(block, StageBlock):
            return block.model_dump(mode=info.mode)
        return [item.model_dump(mode=info.mode) for item in block]

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Settings that the published package does not know are dumped only where they are set."""
        fields: dict[str, Any] = dump(self)
        for name in ("tile", "checkpoint_global", "offload"):
            if fields.get(name) == MBLMModelConfig.model_fields[name].default:
                fields.pop(name, None)
        return fields

    def stage_blocks(self) -> Sequence[StageBlock]:
        """The blocks, one per stage."""
        if isinstance(self.block, StageBlock):
            return [self.block] * len(self.hidden_dims)
        return self.block


class MBLMEncoderModelConfig(_Config):
    """Configuration of a bidirectional hierarchy.

    Attributes:
        mask_token_id: Id that stands for a masked byte.
        mblm_config: The hierarchy; its blocks are bidirectional.
        mask_reduce_strat: How the attention mask of the bytes becomes that of the patches.
    """

    mask_token_id: int
    mblm_config: MBLMModelConfig
    mask_reduce_strat: MaskReduceStrat = MaskReduceStrat.ANY


def _parse_stage_block(value: Any) -> StageBlock:
    if isinstance(value, StageBlock):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"block: expected a stage block or a mapping, got {value!r}")
    return block_registry.try_parse(value, lambda block, data: block.model_validate(data))
