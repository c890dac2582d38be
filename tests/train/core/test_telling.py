"""What a run says of itself, line by line."""

import math
from pathlib import Path

from mblm.train.core.telling import describe_data, describe_model, describe_plan, format_loss


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
    training, validation = ("ByteFiles", 1110), ("ByteFiles", 60)
    files = [("book.txt", 1234), ("b", 1)]
    assert describe_data("ByteFiles", [training, files[0]], [validation, files[0]], "byte") == (
        "Data: book.txt, 1,234 bytes; 1,110 bytes to train on, 60 to validate"
    )
    assert describe_data("ByteFiles", [training, *files], [validation, *files], "byte") == (
        "Data: 2 files, 1,235 bytes; 1,110 bytes to train on, 60 to validate"
    )
    assert describe_data("Mine", [("Mine", 9)], [("Mine", 3)], "element") == (
        "Data: Mine; 9 elements to train on, 3 to validate"
    )
    for own in ([], [("a", 2), ("b", 3)]):  # as a dataset's own `lineage` may be
        assert "to validate" not in describe_data("Mine", own, own, "byte")


def test_the_plan() -> None:
    told = describe_plan(
        steps=1000,
        done=0,
        elements=2048,
        unit="byte",
        validations=10,
        workers=1,
        folder=Path("out/run"),
    )
    assert told == "Plan: 1,000 steps of 2,048 bytes, 10 validations; writes to out/run"
    told = describe_plan(
        steps=9, done=2, elements=8, unit="element", validations=1, workers=2, folder=Path("run")
    )
    assert told == (
        "Plan: 9 steps of 8 elements, of which 2 are done, 1 validation, 2 processes; writes to run"
    )
