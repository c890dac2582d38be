"""Train a small model on the bytes of any file with a plain PyTorch loop, and save it.

python examples/train_plain.py book.txt my-model --steps 500
"""

import argparse
import math
from pathlib import Path

import torch

from mblm import MBLM, MBLMModelConfig, TransformerBlock


def build() -> MBLM:
    block = TransformerBlock(
        attn_head_dims=32, attn_num_heads=6, attn_use_rot_embs=True, pos_emb_type="fixed"
    )
    return MBLM(
        MBLMModelConfig(
            num_tokens=257,
            pad_token_id=256,
            hidden_dims=[192, 192],
            num_layers=[3, 3],
            seq_lens=[128, 4],
            train_checkpoint_chunks=None,
            block=block,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = build()
    data = torch.frombuffer(bytearray(arguments.file.read_bytes()), dtype=torch.uint8)
    length = min(model.context_size, len(data))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(arguments.steps):
        starts = torch.randint(0, len(data) - length + 1, (arguments.batch,))
        ids = torch.stack([data[start : start + length] for start in starts])  # (B, L)
        loss = model(ids)  # nats per byte
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step:5}  {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
