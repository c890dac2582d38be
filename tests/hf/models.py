"""Small models as Hugging Face's library has them; only what has asked for that imports this."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mblm import MBLM, MBLMReturnType
from mblm.hf import MBLMForCausalLM
from tests.models import mamba, model, transformer

BLOCKS: dict[str, Callable[[], Any]] = {
    "transformer": transformer,
    "transformer, rope": lambda: transformer(pos_emb_type="rope"),
    "mamba1": lambda: mamba("mamba1", pos_emb_type="rope"),
    "mamba2": lambda: mamba("mamba2"),
}


def build(kind: str = "transformer", **fields: Any) -> MBLM:
    torch.manual_seed(0)
    sizes = {"seq_lens": [30, 4], "num_tokens": 257, "hidden_dims": [16, 8], **fields}
    return model(BLOCKS[kind](), **sizes)


def ids_of(*texts: bytes) -> Tensor:
    return torch.tensor([list(text) for text in texts])


def logits_of(m: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return m(ids).logits if isinstance(m, MBLMForCausalLM) else m(ids, return_type=LOGITS)


LOGITS = MBLMReturnType.LOGITS
IDS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(1))
