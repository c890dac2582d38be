"""A run that has ended, which tests go on with in many ways."""

import shutil
from pathlib import Path

import pytest

from . import jobs


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.train_alone(jobs.Trainer, jobs.config(tmp_path_factory.mktemp("finished")))


@pytest.fixture
def ended(finished: Path, tmp_path: Path) -> Path:
    """A run of `jobs.config`, 12 batches and 4 validations, in `tmp_path`."""
    return shutil.copytree(finished, tmp_path / finished.name)
