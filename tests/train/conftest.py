"""A tiny experiment as a YAML file."""

from pathlib import Path

import pytest
import yaml

from tests.train.experiments import experiment_fields


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Its data and, in the folder ``out``, its runs are beside it."""
    fields = experiment_fields(tmp_path)
    fields["train"] |= {"shuffle_train": True, "max_eval_steps": 2, "seed": 0}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file
