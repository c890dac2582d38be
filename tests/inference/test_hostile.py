"""Compiled decoding called as nothing in the package calls it: refused, nothing misread."""

from typing import Any

import pytest
import torch

from mblm.inference.session import Session
from mblm.model.native_stages import native_transformer
from mblm.ops import _native
from tests.inference.test_native_run import in_pytorch
from tests.models import model, transformer

pytestmark = pytest.mark.skipif(not _native.is_loaded(), reason="nothing is compiled")

# What brings the process down or reads out of bounds is not even run.
TO_DO = pytest.mark.xfail(run=False, reason="not refused yet")


def run(dim: int = 8, vocabulary: int = 6, **given: Any) -> Any:
    """A run of 4 bytes with a stage of one layer, with what fits but for what is given."""
    stage = transformer().to_model(dim, 1).eval()
    keys, values, angles = torch.zeros(1, 1, 2, 5, 4), torch.zeros(1, 1, 2, 5, 4), torch.ones(5, 2)
    arguments: dict[str, Any] = {
        "x": torch.ones(1, dim),
        "pending": torch.zeros(1, dtype=torch.long),
        "max_tokens": [4],
        "max_steps": [4],
        "state": [keys, values, torch.zeros(1, 2, 1, dim // 2), angles, angles],
        "cached": [1],
        "first": [0],
        "table": torch.ones(vocabulary, dim),
        "positions": None,
        "rotation": None,
        "context": None,
        "to_logits": [torch.ones(vocabulary, dim), torch.empty(0), torch.empty(0)],
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 0.0,
        "generator": None,
        "uniform": None,
        "ends": None,
    }
    return native_transformer(stage, "float32").run(*{**arguments, **given}.values())


def test_a_run_that_fits() -> None:
    ids, x, num_tokens, num_steps = run()
    assert (ids.shape, x.shape, num_tokens, num_steps) == ((1, 4), (1, 8), [4], [4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"x": torch.ones(1, 7)}, "x must have shape", id="width"),
        pytest.param({"cached": [2]}, "room for 5 positions", id="past the cache"),
        pytest.param({"cached": [-1]}, "room for 5 positions", id="before the cache"),
        pytest.param({"cached": [1, 1]}, "for each of 2 caches", id="more caches"),
        pytest.param({"cached": []}, "for each of 0 caches", id="no cache"),
        pytest.param({"first": [-1]}, "first must be a position", id="before the patch"),
        pytest.param({"first": [2**63 - 1]}, "first must be a position", id="overflow"),
        pytest.param({"max_steps": [2**63 - 1]}, "room for 5 positions", id="steps"),
        pytest.param({"max_steps": [0]}, "max_steps", id="no steps"),
        pytest.param({"max_tokens": [0]}, "max_tokens", id="no tokens"),
        pytest.param({"uniform": torch.rand(1, 3, 6)}, "uniform must have shape", id="uniform"),
        pytest.param({"pending": torch.tensor([6])}, "ids must lie", id="id too high"),
        pytest.param({"pending": torch.tensor([-1])}, "ids must lie", id="id below 0"),
        pytest.param({"pending": torch.tensor([1, 2])}, "pending", id="id of no row"),
        pytest.param({"state": [torch.ones(1)]}, "3 or 5 tensors", id="state of one tensor"),
        pytest.param(
            {"state": [torch.zeros(1, 1, 2, 5, 4)] * 3}, "delayed must have", id="state's shape"
        ),
        pytest.param({"temperature": float("nan")}, "temperature", id="temperature"),
        pytest.param({"ends": torch.ones(5, dtype=torch.bool)}, "ends", id="ends"),
        pytest.param({"table": torch.ones(5, 8)}, "table must have shape", id="table"),
        pytest.param({"context": torch.ones(1, 3, 8)}, "context must be", id="context"),
        pytest.param({"context": torch.ones(1, 8, 4).mT}, "context must be", id="turned context"),
        pytest.param(
            {"vocabulary": 0, "pending": None}, "to_logits", id="empty vocabulary", marks=TO_DO
        ),
        pytest.param(
            {"dim": 7, "rotation": torch.ones(4, 3, 2)}, "rotation", id="odd width", marks=TO_DO
        ),
        pytest.param(
            {"pending": torch.zeros(1, dtype=torch.long, device="meta")},
            "pending must be on the CPU",
            id="pending elsewhere",
            marks=TO_DO,
        ),
    ],
)
def test_a_run_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**arguments)


@TO_DO
def test_a_layer_without_inputs_gives_its_bias() -> None:
    linear = [torch.empty(4, 0), torch.empty(0), torch.arange(4.0)]
    out = torch.ops.mblm.packed_linear(torch.empty(3, 0), linear)
    assert torch.equal(out, torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("p", [1e-30, pytest.param(1e-46, marks=TO_DO)])
@pytest.mark.parametrize("native", [True, False])
def test_however_small_top_p_is_the_likeliest_is_kept(p: float, native: bool) -> None:
    m = model(transformer(), seq_lens=[4, 4], num_tokens=60)
    likeliest = Session(m).generate(8)
    if native:
        ids = Session(m).generate(8, top_p=p, filter_thres=0)
    else:
        with in_pytorch():
            ids = Session(m).generate(8, top_p=p, filter_thres=0)
    assert torch.equal(ids, likeliest)
