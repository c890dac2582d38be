"""The whole model computes what the reference computed: forward, loss, gradients, generation."""

import os

import pytest
import torch

import mblm
from mblm import MBLMReturnType
from tests import fresh
from tests.conftest import shared_dir
from tests.model.golden import (
    DECODERS,
    ENCODERS,
    FORWARD,
    GRADIENT,
    WITH_GRADIENTS,
    case_files,
    golden_case,
)
from tests.model.tiled import tiled

TILES = pytest.mark.parametrize("tile", [None, 5], ids=["whole", "in tiles"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, **FORWARD)


def test_the_larger_set_is_there() -> None:
    if shared_dir() is None:
        pytest.skip(f"only the repository's own golden cases are tested: {sorted(case_files())}")
    assert len(case_files()) >= 19


@TILES
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_forward(name: str, tile: int | None) -> None:
    case = golden_case(name)
    model = tiled(case.model(), tile)
    for length in case.lengths[1::2] if tile else case.lengths:  # 2, and what no patch ends with
        expected = case.group(f"len{length}")
        ids = expected["ids"]
        loss, logits = model(ids, return_type=MBLMReturnType.LOSS_LOGITS)
        assert_close(logits, expected["logits"])
        assert_close(loss, expected["loss"][0])
        assert_close(model(ids), loss)
        assert_close(model(ids, return_type=MBLMReturnType.LOGITS), expected["logits"])
        hidden = model(ids, return_type=MBLMReturnType.HIDDEN_STATE)
        assert hidden.shape[:2] == ids.shape
        if length > 1:
            assert_close(hidden[:, 1:], expected["hidden_from_1"])


@TILES
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_empty_input_and_masked_loss(name: str, tile: int | None) -> None:
    case = golden_case(name)
    model = tiled(case.model(), tile)
    empty = torch.empty(2, 0, dtype=torch.long)
    assert_close(model(empty, return_type=MBLMReturnType.LOGITS), case.tensors["empty/logits"])
    masked = case.group("masked")
    assert_close(model(masked["ids"], loss_mask=masked["mask"]), masked["loss"][0])


@TILES
@pytest.mark.parametrize("name", [name for name in DECODERS if name in WITH_GRADIENTS])
def test_gradients(name: str, tile: int | None) -> None:
    case = golden_case(name)
    gradients = case.group("grad")
    if not gradients:
        pytest.skip("this copy of the case holds no gradients; the larger set does")
    model = tiled(case.model(), tile and 16, checkpoint_global=tile is not None).train()
    model(case.group(f"len{case.lengths[-1]}")["ids"]).backward()
    actual = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() <= actual.keys()
    for key, expected in gradients.items():
        error = (actual[key] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert error < GRADIENT, f"{key}: {error:.1e} of the largest entry"


@pytest.mark.parametrize("name", DECODERS)
def test_generation(name: str) -> None:
    case = golden_case(name)
    model = case.model()
    expected = case.group("generate")
    prompt = expected["prompt"]
    assert_same_bytes(model, model.generate(prompt), expected["greedy"])
    empty = model.generate(num_tokens_to_generate=len(expected["greedy_empty"]))
    assert_same_bytes(model, empty, expected["greedy_empty"])
    sampled = case.settings["sampled"]
    arguments = {key: sampled[key] for key in ("temperature", "filter_thres")}
    torch.manual_seed(sampled["seed"])
    assert model.generate(prompt, **arguments).tolist() == expected["sampled"].tolist()
    again = model.generate(prompt, seed=sampled["seed"], **arguments)
    assert again.tolist() == expected["sampled"].tolist()


def assert_same_bytes(model: mblm.MBLM, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, unless the two best candidates at the first difference are within rounding."""
    if actual.tolist() == expected.tolist():
        return
    first = int((actual != expected).nonzero()[0])
    logits = model(expected[None, :first], return_type=MBLMReturnType.LOGITS)[0, -1]
    best, second = logits.topk(2).values
    assert best - second < 1e-4, f"byte {first}: {int(actual[first])} != {int(expected[first])}"


@TILES
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoder(name: str, tile: int | None) -> None:
    case = golden_case(name)
    model = tiled(case.model(), tile)
    for length in case.lengths:
        expected = case.group(f"len{length}")
        labels = expected["labels"].clone()
        arguments = {
            "input_ids": expected["ids"],
            "attention_mask": expected["attention_mask"],
            "labels": labels,
        }
        loss, logits = model(**arguments, return_type=MBLMReturnType.LOSS_LOGITS)
        assert_close(loss, expected["loss"][0])
        assert_close(logits, expected["logits"])
        assert_close(model(**arguments, return_type=MBLMReturnType.LOSS), loss)
        hidden = model(**arguments, return_type=MBLMReturnType.HIDDEN_STATE)
        assert_close(hidden, expected["hidden"])
        assert torch.equal(labels, expected["labels"]), "the caller's labels are never written"


def test_all_of_this_without_native_kernels() -> None:
    if os.environ.get("MBLM_NATIVE") == "0":
        pytest.skip("this is the run without native kernels")
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", __file__]
    # One of each kind of stage writes, and none in tiles: much time for nothing new.
    writes = "test_generation and (mamba1_stt_3d or mamba2_ss_2d or rope)"
    chosen = f"not (tiles or seed or test_generation) or {writes}"
    result = fresh.run(code, *arguments, "-k", chosen, MBLM_NATIVE="0")
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("name", DECODERS)
def test_a_seed_means_the_same_initial_weights(name: str) -> None:
    """The golden matrices are as initialized from the seed; vectors were moved off their start."""
    case = golden_case(name)
    torch.manual_seed(case.settings["seed"])
    model = mblm.MBLM(mblm.MBLMModelConfig.model_validate(case.config))
    same = [
        k for k, t in model.state_dict().items() if t.ndim > 1 and torch.equal(t, case.weights[k])
    ]
    assert "to_logits.weight" in same
    assert "token_embs_rev.0.embedding.weight" in same
