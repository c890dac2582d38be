"""A stage of one's own, an LSTM, with and without the hook that makes decoding fast."""

import sys
import time
from typing import Any

import torch
from torch import nn

from mblm import MBLM, MBLMModelConfig, TransformerBlock
from mblm.model.block import StageBlock


class LSTM(nn.Module):
    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, layers, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, S, D) -> (B, S, D)
        return self.lstm(x)[0]


class LSTMWithHook(LSTM):
    def forward_with_state(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        return self.lstm(x, state)  # the state is None at the beginning, then what this returned


class LSTMBlock(StageBlock):
    block_type: str = "lstm"
    with_hook: bool

    def to_model(self, model_dim: int, num_layers: int) -> nn.Module:
        return (LSTMWithHook if self.with_hook else LSTM)(model_dim, num_layers)


def build(with_hook: bool) -> MBLM:
    torch.manual_seed(0)
    local = TransformerBlock(attn_head_dims=32, attn_num_heads=4, attn_use_rot_embs=True)
    config = MBLMModelConfig(
        num_tokens=257,
        pad_token_id=256,
        hidden_dims=[128, 128],
        num_layers=[2, 2],
        seq_lens=[1024, 4],
        train_checkpoint_chunks=None,
        block=[LSTMBlock(with_hook=with_hook), local],
    )
    return MBLM(config).eval()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 512  # bytes to generate
    for with_hook in (False, True):
        model = build(with_hook)
        begin = time.perf_counter()
        ids = model.generate(num_tokens_to_generate=count, enable_progress=False)
        speed = count / (time.perf_counter() - begin)
        print(f"hook: {with_hook!s:5}  {speed:6.0f} bytes/s  first bytes: {ids[:8].tolist()}")


if __name__ == "__main__":
    main()
