"""A small model, as it is saved and as a run leaves it."""

from pathlib import Path

import pytest
import torch
import yaml

from mblm import MBLM
from mblm.utils.io import save_model_state
from tests.models import model, transformer


@pytest.fixture(scope="session")
def bytes_model() -> MBLM:
    torch.manual_seed(0)
    block = transformer(pos_emb_type=None)
    return model(block, seq_lens=[8, 4], num_tokens=257, num_layers=[1, 1])


@pytest.fixture
def saved(bytes_model: MBLM, tmp_path: Path) -> Path:
    """The model in a folder."""
    bytes_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def run_folder(bytes_model: MBLM, tmp_path: Path) -> Path:
    """The model as a training run leaves it: ``.pth`` and ``config.yaml``."""
    folder = tmp_path / "run"
    save_model_state(folder, "model_top1", bytes_model, 1.5)
    params = {**bytes_model.config.model_dump(), "input_seq_len": 32}
    config = {"params": params, "train": {"batch_size": 1}, "io": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
