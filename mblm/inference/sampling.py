"""Sampling the next byte from logits, with the random numbers of the contract."""

import math

import torch

from mblm.utils.checks import check_number

# Below, a temperature is as good as 0: noise decides nothing, but quotients may become infinite.
COLDEST = 1e-30
# Above, a temperature would be infinite in float32, and what is filtered out become NaN.
HOTTEST = torch.finfo(torch.float32).max


def top_k(logits: torch.Tensor, thres: float = 0.5) -> torch.Tensor:
    """Keep the highest ``max(int((1 - thres) * V), 1)`` logits ``(B, V)``, the rest ``-inf``."""
    return keep_highest(logits, count_kept(thres, logits.shape[-1]))


def keep_highest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k highest logits ``(B, V)``, the rest ``-inf``."""
    values, indices = torch.topk(logits, min(k, logits.shape[-1]))
    return torch.full_like(logits, float("-inf")).scatter_(-1, indices, values)


def count_kept(thres: float, num_tokens: int) -> int:
    """How many logits `top_k` keeps."""
    return max(int((1 - thres) * num_tokens), 1)


def keep_top_p(logits: torch.Tensor, p: float, temperature: float = 1.0) -> torch.Tensor:
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


def keep_min_p(logits: torch.Tensor, p: float, temperature: float = 1.0) -> torch.Tensor:
    """Keep tokens at least ``p`` times as likely as the likeliest ``(B, V)``, the rest ``-inf``.

    Computed in float32 at least. Source: Nguyen et al., https://arxiv.org/abs/2407.01082,
    section 3.
    """
    logits = logits.to(sampling_dtype(logits.dtype))
    below = (logits - logits.amax(-1, keepdim=True)) / temperature < math.log(p)
    return logits.masked_fill(below, float("-inf"))


def gumbel_sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample ``argmax(logits / temperature + gumbel)``, ``gumbel = -log(-log(u))``, logs >= 1e-20.

    ``u`` is drawn from the default generator of the logits' device, or from ``generator``, unless
    it is given as ``uniform``. Half precision has too few numbers near 0 and 1, so that it is
    sampled from in float32. A temperature of 0 takes the highest logit.
    """
    logits = logits.to(sampling_dtype(logits.dtype))
    if uniform is None:
        uniform = torch.zeros_like(logits).uniform_(0, 1, generator=generator)
    if abs(temperature) < COLDEST:
        return logits.argmax(dim=dim)
    return (logits / temperature - _log(-_log(uniform))).argmax(dim=dim)


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> torch.Tensor:
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


def _log(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=1e-20).log()


class Sampler:
    """Draws the next byte of every sequence from its logits.

    Args:
        temperature: Divides the logits, >= 0; 0 takes the likeliest byte. Default 1.
        filter_thres: Keeps the highest ``max(int((1 - filter_thres) * V), 1)`` logits, in [0, 1].
            Default 1, the likeliest byte alone.
        top_p: Keeps the fewest likeliest bytes that together reach this probability, in (0, 1],
            instead of what ``filter_thres`` keeps. Default None.
        generator: Where random numbers come from. Default: torch's default generator of the device.

    Raises:
        TypeError: An argument of another type.
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        filter_thres: float = 1.0,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        temperature = check_number("temperature", temperature)
        filter_thres = check_number("filter_thres", filter_thres)
        if top_p is not None:
            top_p = check_number("top_p", top_p)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {generator!r}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
        if not 0 <= filter_thres <= 1:
            raise ValueError(f"filter_thres: expected a number in [0, 1], got {filter_thres}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
        if temperature < COLDEST:
            temperature, filter_thres, top_p = 1.0, 1.0, None
        self.temperature = min(temperature, HOTTEST)
        self.filter_thres = filter_thres
        self.top_p = top_p
        self.generator = generator

    def count_kept(self, num_tokens: int) -> int:
        """How many of the highest logits are kept, unless ``top_p`` decides."""
        return count_kept(self.filter_thres, num_tokens)

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        """Sample from logits ``(B, V)``: ids ``(B,)``. ``uniform (B, V)`` replaces the drawing."""
        if self.top_p is None:
            kept = top_k(logits, self.filter_thres)
        else:
            kept = keep_top_p(logits, self.top_p, self.temperature)
        return gumbel_sample(kept, self.temperature, generator=self.generator, uniform=uniform)
