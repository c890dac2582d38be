"""Hierarchies drawn at random."""

import torch
from hypothesis import strategies as st

from mblm import MBLM, MambaBlock
from tests.models import LSTMBlock, mamba, model, transformer

_BLOCKS = {
    "transformer": lambda: transformer(),
    "transformer, rope": lambda: transformer(pos_emb_type="rope", attn_use_rot_embs=False),
    "transformer, no positions": lambda: transformer(pos_emb_type=None),
    "mamba1": lambda: mamba("mamba1"),
    "mamba1, fixed": lambda: mamba("mamba1", pos_emb_type="fixed"),
    "mamba2": lambda: mamba("mamba2"),
    "lstm": lambda: LSTMBlock(),
    "lstm with hook": lambda: LSTMBlock(with_hook=True, pos_emb_type="rope"),
}


@st.composite
def hierarchies(draw: st.DrawFn) -> MBLM:
    """A model of 1 to 4 stages, mixed blocks, odd and even sizes."""
    stages = draw(st.integers(1, 4), label="stages")
    names = [draw(st.sampled_from(sorted(_BLOCKS)), label="block") for _ in range(stages)]
    blocks = [_BLOCKS[name]() for name in names]
    seq_lens = [draw(st.integers(1, 4), label="seq_len") for _ in range(stages)]
    dims = []
    for block in blocks:
        even = block.pos_emb_type == "rope" or isinstance(block, MambaBlock)
        dims.append(draw(st.sampled_from([4, 6] if even else [3, 4, 6, 7]), label="dim"))
    layers = [draw(st.integers(1, 2), label="layers") for _ in range(stages)]
    torch.manual_seed(draw(st.integers(0, 1000), label="seed"))
    return model(*blocks, seq_lens=seq_lens, hidden_dims=dims, num_layers=layers)
