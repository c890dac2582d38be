"""Sampling the next byte from logits, as a user asks for it."""

import math

import torch

from mblm.model.sampling import COLDEST, HOTTEST, count_kept, sample, sampling_dtype
from mblm.utils.checks import check_number


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
        logits = logits.to(sampling_dtype(logits.dtype))
        if uniform is None:
            uniform = torch.zeros_like(logits).uniform_(0, 1, generator=self.generator)
        kept = self.count_kept(logits.shape[-1])
        return sample(logits, uniform, self.temperature, kept, self.top_p or 0.0, 0.0)
