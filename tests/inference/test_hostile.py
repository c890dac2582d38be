"""Compiled decoding called as nothing in the package calls it: refused, nothing misread."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mblm.inference.session import Session
from mblm.model.native_stages import native_transformer
from tests.inference.test_native_run import in_pytorch
from tests.models import model, transformer
from tests.native import needs_native

pytestmark = needs_native


def run(dim: int = 8, vocabulary: int = 6, **given: Any) -> Any:
    """A run of 4 bytes with a stage of one layer, with what fits but for what is given."""
    stage = native_transformer(transformer().to_model(dim, 1).eval(), "float32")
    packed = [torch.ones(vocabulary, dim), torch.empty(0), torch.empty(0)]
    compiled = torch.ops.mblm.hierarchy([stage], [4], [torch.ones(vocabulary, dim), *packed], [])
    keys, values, angles = torch.zeros(1, 1, 2, 5, 4), torch.zeros(1, 1, 2, 5, 4), torch.ones(5, 2)
    arguments: dict[str, Any] = {
        "state": [keys, values, torch.zeros(1, 2, 1, dim // 2), angles, angles],
        "cached": [1],
        "positions": [0],
        "outputs": [torch.ones(1, dim)],
        "start_outputs": [torch.ones(1, dim)],
        "contexts": [torch.empty(0)],
        "tables": [torch.empty(0), torch.empty(0)],
        "history": [torch.zeros(1, 3, dtype=torch.long)],
        "lengths": [3],
        "pending": torch.zeros(1, dtype=torch.long),
        "max_tokens": [4],
        "room": [4],
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 0.0,
        "generator": None,
        "uniform": None,
        "ends": None,
    }
    return compiled.run(*{**arguments, **given}.values())


def test_a_run_that_fits() -> None:
    ids, outputs, contexts, positions, num_tokens = run()
    assert (ids.shape, outputs[0].shape, positions, num_tokens) == ((1, 4), (1, 8), [4], [4])
    assert contexts[0].numel() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"outputs": [torch.ones(1, 7)]}, "outputs must have shape", id="width"),
        pytest.param({"outputs": [torch.ones(8)]}, r"outputs\[0\] must have shape", id="rank"),
        pytest.param({"outputs": []}, "outputs must have 1 items", id="no outputs"),
        pytest.param({"cached": [2]}, "room for 5 positions", id="past the cache"),
        pytest.param({"cached": [-1]}, "room for 5 positions", id="before the cache"),
        pytest.param({"cached": [1, 1]}, "cached must have 1 items", id="more caches"),
        pytest.param({"lengths": []}, "lengths must not be empty", id="no cache"),
        pytest.param({"lengths": [-1]}, "lengths must be at least", id="length"),
        pytest.param({"lengths": [2]}, "history must be of", id="longer history"),
        pytest.param({"positions": [-1]}, "positions must be at least 0", id="before the patch"),
        pytest.param({"positions": [2**63 - 1]}, "positions must be", id="overflow"),
        pytest.param({"room": [2**63 - 1]}, "room must be at least", id="steps"),
        pytest.param({"room": [5]}, "room for 5 positions", id="more steps than room"),
        pytest.param({"room": [0]}, "room must be at least 1", id="no steps"),
        pytest.param({"max_tokens": [0]}, "max_tokens", id="no tokens"),
        pytest.param({"uniform": torch.rand(1, 3, 6)}, "uniform must have shape", id="uniform"),
        pytest.param({"pending": torch.tensor([6])}, "ids must lie", id="id too high"),
        pytest.param({"pending": torch.tensor([-1])}, "ids must lie", id="id below 0"),
        pytest.param({"pending": torch.tensor([1, 2])}, "pending", id="id of no row"),
        pytest.param({"state": [torch.ones(1)]}, "state must hold more", id="state of one tensor"),
        pytest.param({"state": []}, "state must hold more", id="no state"),
        pytest.param(
            {"state": [torch.zeros(1, 1, 2, 5, 4)] * 3}, "delayed must have", id="state's shape"
        ),
        pytest.param({"temperature": float("nan")}, "temperature", id="temperature"),
        pytest.param({"ends": torch.ones(5, dtype=torch.bool)}, "ends", id="ends"),
        pytest.param({"contexts": [torch.ones(1, 3, 8)]}, "contexts must have", id="context"),
        pytest.param({"tables": [torch.ones(3, 8), torch.empty(0)]}, "positions", id="positions"),
        pytest.param({"vocabulary": 0, "pending": None}, "row for each token", id="no vocabulary"),
        pytest.param(
            {"dim": 7, "tables": [torch.empty(0), torch.ones(4, 3, 2)]}, "even width", id="odd"
        ),
        pytest.param(
            {"pending": torch.zeros(1, dtype=torch.long, device="meta")},
            "pending must be on the CPU",
            id="pending elsewhere",
        ),
    ],
)
def test_a_run_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def upper_and_local(**given: Any) -> Any:
    """A compiled hierarchy of two stages, its weights as given."""
    stages = [native_transformer(transformer().to_model(8, 1).eval(), "float32") for _ in range(2)]
    none = torch.empty(0)
    norm = [torch.ones(32), torch.ones(32), torch.ones(8, 32), none, none]
    weights = [torch.ones(6, 8), torch.ones(6, 8), none, none, torch.ones(6, 8), *norm]
    weights += [torch.ones(8), torch.ones(8), torch.ones(32, 8), none, none]
    arguments = {"seq_lens": [3, 4], "weights": weights, "eps": [1e-5, 1e-5]}
    return torch.ops.mblm.hierarchy(stages, *{**arguments, **given}.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"seq_lens": [3]}, "seq_lens must have 2 items", id="seq_lens"),
        pytest.param({"seq_lens": [3, 5]}, "must have shape", id="patch size"),
        pytest.param({"seq_lens": [3, -4]}, "seq_lens must be positive", id="negative"),
        pytest.param({"seq_lens": [2**62, 2**62]}, "seq_lens must be positive", id="overflow"),
        pytest.param({"eps": []}, "eps must have 2 items", id="eps"),
        pytest.param({"weights": []}, "weights must hold more than 0", id="no weights"),
    ],
)
def test_a_hierarchy_is_refused(arguments: dict[str, Any], message: str) -> None:
    assert upper_and_local() is not None
    with pytest.raises(ValueError, match=message):
        upper_and_local(**arguments)


def test_a_layer_without_inputs_gives_its_bias() -> None:
    linear = [torch.empty(4, 0), torch.empty(0), torch.arange(4.0)]
    out = torch.ops.mblm.packed_linear(torch.empty(3, 0), linear)
    assert torch.equal(out, torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-38])
@pytest.mark.parametrize("native", [True, False])
def test_however_low_the_temperature_is_the_likeliest_is_taken(
    temperature: float, native: bool
) -> None:
    m = model(transformer(), seq_lens=[4, 4], num_tokens=60)
    with torch.no_grad():
        m.to_logits.bias += 100.0  # which divided by the last of these is infinite
    likeliest = Session(m).generate(8)
    with nullcontext() if native else in_pytorch():
        ids = Session(m).generate(8, temperature=temperature, filter_thres=0, top_p=0.9)
    assert torch.equal(ids, likeliest)


@pytest.mark.parametrize("p", [1e-30, 1e-46])
@pytest.mark.parametrize("native", [True, False])
def test_however_small_top_p_is_the_likeliest_is_kept(p: float, native: bool) -> None:
    m = model(transformer(), seq_lens=[4, 4], num_tokens=60)
    likeliest = Session(m).generate(8)
    with nullcontext() if native else in_pytorch():
        ids = Session(m).generate(8, top_p=p, filter_thres=0)
    assert torch.equal(ids, likeliest)
