"""What a run says of itself, line by line."""

import math
from pathlib import Path
from typing import Any

from mblm.train.core.config import Lineage
from mblm.train.core.lineage import lineage_of
from mblm.train.core.schedule import plan_run
from mblm.train.core.telling import describe_run, format_loss

from . import jobs
from .test_lineage import Files


def test_losses_of_bytes_are_in_bits() -> None:
    assert format_loss(2 * math.log(2), "byte") == "2.000 bits per byte"
    assert format_loss(1.5, "element") == "loss 1.5000"


def told(data: Files, parts: dict[str, int], done: int, workers: int) -> list[str]:
    of_data = lineage_of(data)
    lineage = Lineage(
        package="1", stages=[], seed=0, training_data=of_data, validation_data=of_data
    )
    cfg = jobs.config(Path("out"), batches=1000, workers=workers, validate_amount=workers)
    how: dict[str, Any] = {"done": done, "elements": 2048, "unit": "byte", "workers": workers}
    plan = plan_run(cfg, workers)
    return describe_run(1234, parts, lineage, plan, folder=Path("run"), **how)


def test_what_is_trained() -> None:
    assert told(Files(("book", 1234)), {}, 0, 1) == [
        "Model: 1,234 parameters",
        "Data: book, 1,234 bytes; 384 bytes to train on, 384 to validate",
        "Plan: 1,000 steps of 2,048 bytes, 1 validation; writes to run",
    ]
    documents = Files(("a", 1234), ("b", 1))
    documents.is_sequential = False
    assert told(documents, {"stage 1": 1000, "stage 2": 200}, 3, 2) == [
        "Model: 1,234 parameters (stage 1 1,000, stage 2 200, around them 34)",
        "Data: 2 files, 1,235 bytes; 384 samples to train on, 384 to validate",
        "Plan: 1,000 steps of 2,048 bytes, of which 3 are done, 2 validations, 2 processes; "
        "writes to run",
    ]
    assert told(Files(), {}, 0, 1)[1] == "Data: Files; 384 bytes to train on, 384 to validate"
