"""Choosing a byte from logits: what is kept, and the random numbers of the contract."""

import math

import torch
from torch import Tensor

# Below, a temperature is as good as 0: noise decides nothing, but quotients may become infinite.
COLDEST = 1e-30
# Above, a temperature would be infinite in float32, and what is filtered out become NaN.
HOTTEST = torch.finfo(torch.float32).max


def top_k(logits: Tensor, thres: float = 0.5) -> Tensor:
    """Keep the highest ``max(int((1 - thres) * V), 1)`` logits ``(B, V)``, the rest ``-inf``.

    By default the higher half.
    """
    if math.isnan(thres):
        raise ValueError("thres: expected a number, got nan")
    return keep_highest(logits, count_kept(thres, logits.shape[-1]))


def keep_highest(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest logits ``(B, V)``, the rest ``-inf``."""
    values, indices = torch.topk(logits, min(k, logits.shape[-1]))
    return torch.full_like(logits, float("-inf")).scatter_(-1, indices, values)


def count_kept(thres: float, num_tokens: int) -> int:
    """How many logits `top_k` keeps."""
    return max(int((1 - thres) * num_tokens), 1)


def keep_top_p(logits: Tensor, p: float, temperature: float = 1.0) -> Tensor:
    """Keep the fewest likeliest tokens whose probability reaches ``p``, the rest ``-inf``.

    Computed in float32 at least. Source: Holtzman et al., https://arxiv.org/abs/1904.09751,
    section 3.1.
    """
    logits = logits.to(sampling_dtype(logits.dtype))
    ordered, indices = torch.sort(logits / temperature, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    p = max(p, torch.finfo(logits.dtype).tiny)  # with 0, the likeliest would go too
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, indices, before >= p)
    return logits.masked_fill(drop, float("-inf"))


def keep_min_p(logits: Tensor, p: float, temperature: float = 1.0) -> Tensor:
    """Keep tokens at least ``p`` times as likely as the likeliest ``(B, V)``, the rest ``-inf``.

    Computed in float32 at least. Source: Nguyen et al., https://arxiv.org/abs/2407.01082,
    section 3.
    """
    logits = logits.to(sampling_dtype(logits.dtype))
    below = (logits - logits.amax(-1, keepdim=True)) / temperature < math.log(p)
    return logits.masked_fill(below, float("-inf"))


def gumbel_sample(
    logits: Tensor,
    temperature: float = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Sample ``argmax(logits / temperature + gumbel)``, ``gumbel = -log(-log(u))``, logs >= 1e-20.

    Args:
        logits: ``(B, V)``. Half precision has too few numbers near 0 and 1, so that it is sampled
            from in float32.
        temperature: Divides the logits; 0 takes the highest. Default 1.
        dim: What is sampled over. Default: the last.
        generator: What draws ``u``. Default: torch's default generator of the logits' device.
        uniform: ``u`` itself, like the logits.

    Returns:
        Ids ``(B,)`` int64.
    """
    if math.isnan(temperature):
        raise ValueError("temperature: expected a number, got nan")
    logits = logits.to(sampling_dtype(logits.dtype))
    if uniform is None:
        uniform = torch.zeros_like(logits).uniform_(0, 1, generator=generator)
    if abs(temperature) < COLDEST:
        return logits.argmax(dim=dim)
    return (logits / temperature - _log(-_log(uniform))).argmax(dim=dim)


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Sample ids ``(B,)`` from logits ``(B, V)`` as a plan says, with numbers ``(B, V)``."""
    if temperature < COLDEST:
        return logits.argmax(-1)
    by_p = top_p > 0
    logits = keep_top_p(logits, top_p, temperature) if by_p else keep_highest(logits, top_k)
    if min_p > 0:
        logits = keep_min_p(logits, min_p, temperature)
    return gumbel_sample(logits, temperature, uniform=uniform)


def sampling_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of this dtype are sampled in."""
    return torch.promote_types(dtype, torch.float32)


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=1e-20).log()
