"""What a run says of itself, line by line."""

import math
from pathlib import Path
from typing import ClassVar

from mblm.train.core.lineage import lineage_of
from mblm.train.core.schedule import plan_run
from mblm.train.core.telling import describe_data, describe_model, describe_plan, format_loss

from . import jobs


def test_losses_of_bytes_are_in_bits() -> None:
    assert format_loss(2 * math.log(2), "byte") == "2.000 bits per byte"
    assert format_loss(1.5, "element") == "loss 1.5000"


def test_parameters() -> None:
    parts = {"stage 1": 1000, "stage 2": 200}
    assert describe_model(1234, parts) == (
        "Model: 1,234 parameters (stage 1 1,000, stage 2 200, around them 34)"
    )
    assert describe_model(1234, {}) == "Model: 1,234 parameters"


def test_data() -> None:
    class Mine(jobs.Ids):
        files: ClassVar[list[tuple[str, int]]] = []

        def lineage(self) -> list[tuple[str, int]]:
            return self.files

    def told(unit: str, *files: tuple[str, int]) -> str:
        Mine.files = list(files)
        return describe_data(lineage_of(Mine(200)), lineage_of(Mine(9)), unit)

    assert told("element") == "Data: Mine; 1,600 elements to train on, 72 to validate"
    book, parts = ("book.txt", 1234), "; 1,600 bytes to train on, 72 to validate"
    assert told("byte", book) == f"Data: book.txt, 1,234 bytes{parts}"
    assert told("byte", book, ("b", 1)) == f"Data: 2 files, 1,235 bytes{parts}"

    class Documents(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.is_sequential = False

    lineage = lineage_of(Documents())
    assert describe_data(lineage, lineage, "byte").endswith(
        "384 samples to train on, 384 to validate"
    )


def test_the_plan() -> None:
    fields = {"batches": 1000, "validate_amount": 10}
    plan = plan_run(jobs.config(Path("out"), **fields), 1)
    told = describe_plan(plan, 0, "2,048 bytes", 1, Path("out/run"))
    assert told == "Plan: 1,000 steps of 2,048 bytes, 10 validations; writes to out/run"
    plan = plan_run(jobs.config(Path("out"), batches=9, workers=2, validate_amount=1), 2)
    assert describe_plan(plan, 2, "8 elements", 2, Path("run")) == (
        "Plan: 9 steps of 8 elements, of which 2 are done, 1 validation, 2 processes; writes to run"
    )
