"""PG19 for an encoder: books of which some bytes are hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from mblm.data.dataset.pg19 import PG19Books
from mblm.data.datasets import DistributedDatasetConfig
from mblm.data.types import BatchMaskedForMLM, ModelMode


class PG19Masked(PG19Books[BatchMaskedForMLM]):
    """PG19 for an encoder: a sample is ``(masked ids, mask, labels)``, each ``(seq_len,)``.

    Ids and labels are int64, the mask is boolean and True where the id is hidden. Each id is
    hidden by itself, drawn from torch's default generator.

    Args:
        data_dir, mode, config: As ``PG19Books``.
        masked_token_id: What a hidden id becomes.
        masking_proba: The share of ids that are hidden.
        load_mininterval, display_load_progress: Accepted as in ``PG19``, without effect.
        padding_token_id: Fills a sample that the end of the books cuts off.

    Raises:
        FileNotFoundError: No folder of that part.
        ValueError: A share outside [0, 1], one id for hiding and padding, no books, or too few.
    """

    def __init__(
        self,
        data_dir: str | Path,
        mode: ModelMode,
        masked_token_id: int = -100,
        masking_proba: float = 0.15,
        load_mininterval: int = 30,
        display_load_progress: bool = True,
        padding_token_id: int = -101,
        **config: Unpack[DistributedDatasetConfig],
    ) -> None:
        if masked_token_id == padding_token_id:
            raise ValueError(
                f"masked_token_id: expected another id than padding_token_id, got {masked_token_id}"
            )
        if not 0 <= masking_proba <= 1:
            raise ValueError(f"masking_proba: expected a share in [0, 1], got {masking_proba}")
        super().__init__(data_dir, mode, **config)
        self.masking_proba = masking_proba
        self.masked_token_id = masked_token_id
        self.padding_token_id = padding_token_id

    @staticmethod
    def _configured(config: Any) -> dict[str, Any]:
        return {
            "masked_token_id": config.params.mask_token_id,
            "masking_proba": config.train.masking_proba,
            "padding_token_id": config.params.mblm_config.pad_token_id,
        }

    def get_sample(self, from_idx: int) -> BatchMaskedForMLM:
        """The ids from byte ``from_idx`` on with some hidden, which, and the ids as they are."""
        ids = self.data.read(from_idx, from_idx + self.seq_len)
        mask = torch.rand(ids.shape) < self.masking_proba
        # Padding is never hidden, so the loss never sees it.
        padding = (0, self.seq_len - len(ids))
        labels = torch.nn.functional.pad(ids, padding, value=self.padding_token_id)
        mask = torch.nn.functional.pad(mask, padding, value=False)
        return labels.masked_fill(mask, self.masked_token_id), mask, labels
