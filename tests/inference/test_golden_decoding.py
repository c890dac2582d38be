"""Decoding gives the bytes that were recorded, with compiled code and without."""

import json

import pytest
import torch

from mblm.ops import _native
from tests.golden.decoding import FILE, Case, as_json, cases

RECORDED = json.loads(FILE.read_text())
# Weights that are rounded, and how long pieces that are taken in with those that are not may be.
CLOSE = {"float32": 5e-5, "bfloat16": 0.05, "int8": 0.05}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_as_recorded(case: Case) -> None:
    if case.weights != "float32" and not _native.is_loaded():
        pytest.skip("weights are rounded for compiled code alone")
    want = dict(RECORDED[str(case)])
    got = as_json(case.run(want.pop("seed")))
    assert got.keys() == want.keys()
    for name, value in want.items():
        if "logits" in name:
            close = {"atol": CLOSE[case.weights], "rtol": 1e-4}
            torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(value), **close)
        elif name == "numbers":
            assert got[name] == pytest.approx(value, abs=1e-6), "as many numbers are drawn"
        else:
            assert got[name] == value


def test_every_case_is_recorded() -> None:
    assert [*RECORDED] == [str(case) for case in cases()]
