"""Special tokens around and behind the ids of a modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812


@dataclass
class TokenizerOptions:
    """The special tokens; one that is None is never inserted.

    Args:
        pad_token_id: Fills up at the end.
        eom_token_id: Ends a modality.
        som_text_token_id: Starts text.
        som_image_token_id: Starts an image.
    """

    pad_token_id: int
    eom_token_id: int | None
    som_text_token_id: int | None
    som_image_token_id: int | None
    dtype = torch.long


@dataclass
class Tokenizer:
    """Adds special tokens to ids.

    Example::

        tokenize = Tokenizer(TokenizerOptions(256, 257, 258, 259)).pipeline
        ids = tokenize(text).with_som_text().with_eom().pad_right_to(100).to_long_tensor()
    """

    options: TokenizerOptions

    def pipeline(self, tensor: torch.Tensor) -> TokenizerPipeline:
        """Start with ids ``(L,)`` of any integer dtype.

        Raises:
            ValueError: Not one-dimensional.
        """
        return TokenizerPipeline(tensor=tensor, options=self.options)


@dataclass
class TokenizerPipeline:
    """Ids on their way: every method but the last changes ``tensor`` and returns the pipeline."""

    tensor: torch.Tensor
    options: TokenizerOptions

    def __post_init__(self) -> None:
        if self.tensor.ndim != 1:
            raise ValueError(f"tensor: expected 1 dimension, got shape {tuple(self.tensor.shape)}")

    def _special(self, token_id: int | None) -> torch.Tensor:
        ids = [] if token_id is None else [token_id]
        return torch.tensor(ids, dtype=self.options.dtype)

    def with_eom(self) -> TokenizerPipeline:
        """Put the end of the modality behind."""
        self.tensor = torch.cat([self.tensor, self._special(self.options.eom_token_id)])
        return self

    def with_som_text(self) -> TokenizerPipeline:
        """Put the start of text before."""
        self.tensor = torch.cat([self._special(self.options.som_text_token_id), self.tensor])
        return self

    def with_som_image(self) -> TokenizerPipeline:
        """Put the start of an image before."""
        self.tensor = torch.cat([self._special(self.options.som_image_token_id), self.tensor])
        return self

    def pad_right_to(self, to_length: int, strict: bool = True) -> TokenizerPipeline:
        """Fill up to ``to_length`` with padding; what is longer is cut off if not ``strict``.

        Raises:
            ValueError: Longer than ``to_length`` already, and ``strict``.
        """
        missing = to_length - len(self.tensor)
        if strict and missing < 0:
            raise ValueError(f"to_length: {len(self.tensor)} ids do not fit into {to_length}")
        self.tensor = F.pad(self.tensor.long(), (0, missing), value=self.options.pad_token_id)
        return self

    def to_long_tensor(self) -> torch.Tensor:
        """The ids so far, ``(L,)``, int64."""
        return self.tensor.long()
