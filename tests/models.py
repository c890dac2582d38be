"""Small models for tests, of blocks of every kind."""

from typing import Any

import pytest
import torch
from torch import nn

from mblm import (
    MBLM,
    MambaBlock,
    MBLMEncoder,
    MBLMEncoderModelConfig,
    MBLMModelConfig,
    TransformerBlock,
    TransformerEncoderBlock,
)
from mblm.model.block import StageBlock

# As a mark of what runs `LSTM` under autocast.
needs_bfloat16_lstm = pytest.mark.skipif(
    torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="PyTorch's LSTM in bfloat16 needs AVX-512",
)


class LSTM(nn.Module):
    """A user's stage model that knows nothing of decoding."""

    def __init__(self, model_dim: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(model_dim, model_dim, num_layers, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class LSTMWithHook(LSTM):
    """The same with the hook that makes decoding fast."""

    def forward_with_state(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return self.lstm(x, state)


class LSTMBlock(StageBlock):
    block_type: str = "lstm"
    with_hook: bool = False

    def to_model(self, model_dim: int, num_layers: int) -> nn.Module:
        return (LSTMWithHook if self.with_hook else LSTM)(model_dim, num_layers)


def transformer(**fields: Any) -> TransformerBlock:
    defaults: dict[str, Any] = {
        "attn_head_dims": 4,
        "attn_num_heads": 2,
        "attn_use_rot_embs": True,
        "pos_emb_type": "fixed",
    }
    return TransformerBlock(**{**defaults, **fields})


def mamba(block_type: str = "mamba1", **fields: Any) -> MambaBlock:
    defaults: dict[str, Any] = {"d_state": 4, "d_conv": 3, "expand": 2, "headdim": 4}
    return MambaBlock(block_type=block_type, **{**defaults, **fields})


def model(
    *blocks: StageBlock,
    seq_lens: list[int],
    hidden_dims: list[int] | None = None,
    num_tokens: int = 19,
    pad_token_id: int | None = None,
    **fields: Any,
) -> MBLM:
    """A small model in evaluation mode, one layer per stage unless ``num_layers`` says more."""
    config = MBLMModelConfig(
        num_tokens=num_tokens,
        pad_token_id=num_tokens - 1 if pad_token_id is None else pad_token_id,
        hidden_dims=hidden_dims or [8] * len(seq_lens),
        num_layers=fields.pop("num_layers", [1] * len(seq_lens)),
        seq_lens=seq_lens,
        train_checkpoint_chunks=fields.pop("train_checkpoint_chunks", None),
        block=list(blocks) if len(blocks) > 1 else blocks[0],
        **fields,
    )
    return MBLM(config).eval()


def encoder(
    *, seq_lens: list[int], mask_reduce_strat: str = "any", num_tokens: int = 19, **fields: Any
) -> MBLMEncoder:
    """A small bidirectional model in evaluation mode; the last two ids are mask and padding."""
    config = MBLMModelConfig(
        num_tokens=num_tokens,
        pad_token_id=num_tokens - 1,
        hidden_dims=[8] * len(seq_lens),
        num_layers=[1] * len(seq_lens),
        seq_lens=seq_lens,
        train_checkpoint_chunks=fields.pop("train_checkpoint_chunks", None),
        block=TransformerEncoderBlock(
            **{**transformer(**fields).model_dump(exclude={"block_type"})}
        ),
    )
    return MBLMEncoder(
        MBLMEncoderModelConfig(
            mask_token_id=num_tokens - 2, mblm_config=config, mask_reduce_strat=mask_reduce_strat
        )
    ).eval()
