"""What was generated for a prompt, and why it ended there."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mblm.inference.prompt import to_bytes, to_text
from mblm.utils.modes import lasting_tensors

# Why generation ended: `Reason` of `mblm.inference.cache` but for its pauses, and "closed".
FinishReason = Literal["stop", "matched", "length", "context", "memory", "error", "closed"]


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for a prompt.

    Attributes:
        prompt: The prompt, token ids ``(L,)`` int64 on the CPU; none if it was refused.
        ids: What was generated after it, ``(n,)`` int64 on the CPU.
        finish_reason: Why it ended: ``"stop"``, a stop string or the end's id, which is kept;
            ``"matched"``, the constraint is complete; ``"length"``, as many as asked for;
            ``"context"``, no more positions; ``"memory"``; ``"error"``, see ``error``; or
            ``"closed"``, a stream was.
        is_matched: Whether the constraint accepts what was generated. None without one.
        log_probs: Log-probability of each generated id, ``(n,)`` float32 on the CPU, of the model's
            own logits. None unless asked for.
        seed: What the random numbers were seeded with. None where they come from elsewhere.
        error: What was raised for this prompt, or what ended all.
    """

    prompt: Tensor
    ids: Tensor
    finish_reason: FinishReason
    is_matched: bool | None = None
    log_probs: Tensor | None = None
    seed: int | None = None
    error: BaseException | None = None

    @property
    def data(self) -> bytes:
        """What was generated, without ids from 256 on, which are no bytes."""
        return to_bytes(self.ids)

    @property
    def text(self) -> str:
        """`data` as UTF-8; what is none becomes U+FFFD."""
        return to_text(self.ids)


def nothing_generated(
    reason: FinishReason, seed: int | None, error: BaseException | None
) -> Generation:
    """Of a prompt that had no row."""
    with lasting_tensors():
        prompt, ids = (torch.empty(0, dtype=torch.long, device="cpu") for _ in range(2))
        return Generation(prompt, ids, reason, seed=seed, error=error)
