"""What datasets and trainers speak of: the parts of a dataset, and the batches."""

from enum import Enum
from typing import TypeAlias

import torch


class ModelMode(Enum):
    """Which part of a dataset is meant."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


BatchWithLossMask: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""``(ids, loss_mask)``; a sample's are ``(L,)``, a batch's ``(B, L)``."""

BatchMaskedForMLM: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""``(masked ids, mask, labels)``; the mask is boolean, True where an id is hidden."""
