"""What tests of decoding share: models wide enough for whole lanes, and PyTorch's way on demand."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from mblm import MBLM
from mblm.inference import batch, continuation, session
from mblm.inference.torch_cache import TorchCache
from tests.models import mamba, model, transformer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
STAGES: dict[str, Any] = {
    "transformer": lambda: transformer(attn_head_dims=32, attn_num_heads=3),
    "transformer without rotary": lambda: transformer(
        attn_head_dims=5, attn_use_rot_embs=False, pos_emb_type="rope"
    ),
    "mamba1": lambda: mamba("mamba1", d_state=20),
    "mamba2": lambda: mamba("mamba2", d_state=20, d_conv=1),
}


@contextmanager
def in_pytorch() -> Iterator[None]:
    """What begins here takes PyTorch's way, as do forks of its sessions."""
    with ExitStack() as stack:
        for module in (session, continuation, batch):
            stack.enter_context(patch.object(module, "cache_for", lambda m, *_: TorchCache(m)))
        yield


def alone(m: MBLM, prompt: bytes, count: int, **wishes: Any) -> list[int]:
    """What `MBLM.generate` gives after a prompt."""
    ids = m.generate(prompt, num_tokens_to_generate=count, enable_progress=False, **wishes)
    return ids[len(prompt) :].tolist()


def wide(*names: str, seq_lens: list[int] | None = None, width: int = 40) -> MBLM:
    """Stages of two layers of a width of whole lanes and a remainder.

    One of 360 is worth several threads.
    """
    blocks = [STAGES[name]() for name in names]
    count = len(blocks)
    return model(
        *blocks,
        seq_lens=seq_lens or [6, 5, 4][-count:],
        hidden_dims=[width] * count,
        num_layers=[2] * count,
        num_tokens=67,
    )
