"""Where tests find the larger set of reference data, and what every test starts from."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def shared_dir() -> Path | None:
    """The folder with golden numbers and corpora: ``MBLM_SHARED``, or beside the checkout."""
    folder = Path(os.environ.get("MBLM_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of reference data; the test is skipped where there is none."""
    folder = shared_dir()
    if folder is None:
        pytest.skip("no reference data: set MBLM_SHARED or put shared/ beside the checkout")
    return folder
