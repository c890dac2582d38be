"""Bad input is refused by the name of the argument: by native kernels and by references."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.samples import reference_of

IDS = torch.zeros(3, 4, dtype=torch.int64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def wide(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def with_id(value: int, *place: int) -> Tensor:
    ids = IDS.clone()
    ids[place] = value
    return ids


# Arguments that are right, in their order.
GOOD: dict[str, dict[str, Any]] = {
    "assemble_stage": {
        "start_token": zeros(6),
        "embeddings": zeros(5, 6),
        "ids": IDS,
        "positions": zeros(5, 6),
        "rotation": zeros(6, 3, 2),
        "context": zeros(3, 4, 6),
        "padding_idx": -1,
    },
    "assemble_stage_backward": {
        "grad": zeros(3, 5, 6),
        "ids": IDS,
        "rotation": None,
        "num_embeddings": 5,
        "num_positions": 4,
        "padding_idx": -1,
    },
    "causal_conv": {
        "x": zeros(2, 6, 5),
        "weight": zeros(5, 1, 4),
        "bias": zeros(5),
        "window": zeros(2, 3, 5),
    },
    "embed_patches": {
        "ids": IDS,
        "table": zeros(7, 3),
        "weight": zeros(6),
        "bias": zeros(6),
        "num_patches": 2,
        "patch_size": 2,
        "pad_token_id": 2,
        "eps": 1e-5,
    },
    "embed_patches_backward": {
        "grad": zeros(3, 2, 6),
        "ids": IDS,
        "table": zeros(7, 3),
        "weight": zeros(6),
        "mean": zeros(3, 2),
        "inverse_std": zeros(3, 2),
        "patch_size": 2,
        "pad_token_id": 2,
    },
    "gated_rms_norm": {"x": zeros(2, 3, 4), "weight": zeros(4), "gate": zeros(2, 3, 4), "eps": 1.0},
    "gated_rms_norm_backward": {
        "grad": zeros(2, 3, 4),
        "x": zeros(2, 3, 4),
        "weight": zeros(4),
        "gate": None,
        "inverse_norm": zeros(2, 3),
        "eps": 1.0,
    },
    "linear": {"x": zeros(1, 5), "weight": zeros(4, 5), "bias": zeros(4)},
    "selective_scan": {
        "x": zeros(2, 5, 3),
        "delta": zeros(2, 5, 3),
        "A": zeros(3, 2),
        "B": zeros(2, 5, 2),
        "C": zeros(2, 5, 2),
        "D": zeros(3),
        "initial_state": zeros(2, 3, 2),
        "chunk_size": 4,
    },
    "shift_rms_norm": {
        "x": zeros(2, 3, 4),
        "weight": zeros(4),
        "previous": zeros(2, 2),
        "shift": True,
        "eps": 1.0,
    },
    "shift_rms_norm_backward": {
        "grad": zeros(2, 3, 4),
        "x": zeros(2, 3, 4),
        "weight": zeros(4),
        "previous": None,
        "inverse_norm": zeros(2, 3),
        "shift": True,
        "eps": 1.0,
    },
    "short_attention": {
        "q": zeros(2, 5, 3, 4),
        "k": zeros(2, 6, 3, 4),
        "v": zeros(2, 6, 3, 4),
        "cos": zeros(6, 2),
        "sin": zeros(6, 2),
    },
    "ssd": {
        "x": zeros(2, 5, 3, 2),
        "dt": zeros(2, 5, 3),
        "A": zeros(3),
        "B": zeros(2, 5, 2),
        "C": zeros(2, 5, 2),
        "D": zeros(3),
        "initial_state": zeros(2, 3, 2, 2),
        "chunk_size": 4,
    },
}

# By operator: an argument, what is given for it, and words of the error.
BAD: dict[str, list[tuple[str, Any, str]]] = {
    "assemble_stage": [
        ("embeddings", zeros(5, 6).long(), "embeddings must be float16, bfloat16, float32 or"),
        ("embeddings", zeros(6), "embeddings must have shape [V, D]"),
        ("ids", None, "embeddings must have shape [rows, P, D], got [5, 6]"),
        ("ids", zeros(3, 4), "ids must be int64, got"),
        ("ids", IDS[0], "ids must have two dimensions, got [4]"),
        ("ids", with_id(5, 1, 1), "ids must lie in [0, 5), got 5 at index 5"),
        ("ids", with_id(-1, 2, 3), "ids must lie in [0, 5), got -1 at index 11"),
        ("start_token", zeros(5), "start_token must have shape [6]"),
        ("start_token", wide(6), "start_token must have the dtype of embeddings"),
        ("positions", zeros(3, 6), "positions must have shape [>= 4, 6], got [3, 6]"),
        ("positions", wide(4, 6), "positions must have the dtype of embeddings"),
        ("rotation", zeros(4, 2, 2), "rotation must have shape [>= 4, 3, 2], got [4, 2, 2]"),
        ("rotation", zeros(3, 3, 2), "rotation must have shape [>= 4, 3, 2], got [3, 3, 2]"),
        ("rotation", zeros(4, 3, 2).int(), "rotation must be float16, bfloat16, float32 or"),
        ("context", zeros(3, 5, 6), "context must have shape [3, 4, 6], got [3, 5, 6]"),
        ("context", wide(3, 4, 6), "context must have the dtype of embeddings"),
    ],
    "assemble_stage_backward": [
        ("grad", zeros(3, 0, 6), "grad must have shape [rows, 1 + P, D]"),
        ("grad", zeros(3, 6), "grad must have shape [rows, 1 + P, D]"),
        ("grad", zeros(3, 6, 6), "ids must have shape [3, 5]"),
        ("ids", IDS + 5, "ids must lie in [0, 5), got 5 at index 0"),
        ("rotation", zeros(3, 3, 2), "rotation must have shape"),
        ("num_positions", -1, "num_positions must not be negative, got -1"),
    ],
    "causal_conv": [
        ("x", zeros(2, 5), "x must have shape [B, L, D], got [2, 5]"),
        ("x", zeros(2, 6, 5).long(), "x must be float16, bfloat16"),
        ("weight", zeros(5, 4), "weight must have shape [5, 1, K]"),
        ("weight", zeros(4, 1, 4), "weight must have shape [5, 1, K]"),
        ("weight", zeros(5, 1, 0), "K >= 1, got [5, 1, 0]"),
        ("bias", zeros(4), "bias must have shape [5], got [4]"),
        ("bias", wide(5), "bias must have the dtype of weight"),
        ("window", zeros(2, 2, 5), "window must have shape [2, 3, 5], got [2, 2, 5]"),
        ("window", zeros(2, 3, 5).half(), "window must have the dtype of x"),
    ],
    "embed_patches": [
        ("ids", zeros(3, 4), "ids must be int64, got"),
        ("ids", IDS[0], "ids must have two dimensions, got [4]"),
        ("ids", with_id(7, 0, 2), "ids must lie in [0, 7), got 7 at index 2"),
        ("ids", with_id(-3, 0, 0), "ids must lie in [0, 7), got -3 at index 0"),
        ("table", zeros(7, 3).int(), "table must be float16, bfloat16, float32 or float64, got"),
        ("table", zeros(7), "table must have shape [V, D]"),
        ("table", zeros(7, 0), "D >= 1, got [7, 0]"),
        ("weight", zeros(5), "weight must have shape"),
        ("weight", wide(6), "weight must have the dtype of table"),
        ("bias", zeros(2, 3), "bias must have shape [6], got [2, 3]"),
        ("bias", wide(6), "bias must have the dtype of table"),
        ("num_patches", 1, "must be at least 4, the length of ids, got 1 * 2"),
        ("num_patches", -1, "must be at least 4, the length of ids, got -1 * 2"),
        ("patch_size", 0, "patch_size must be at least 1, got 0"),
        ("patch_size", 2**62 + 2, "weight must have shape"),  # times 2 more than 64 bits
        ("pad_token_id", 7, "pad_token_id must lie in [0, 7), got 7"),
        ("pad_token_id", -1, "pad_token_id must lie in [0, 7), got -1"),
        ("eps", -1e-5, "eps must not be negative, got -1e-05"),
    ],
    "embed_patches_backward": [
        ("grad", zeros(3, 2, 5), "grad must have shape [3, 2, 6]"),
        ("grad", wide(3, 2, 6), "grad must have the dtype of table"),
        ("ids", IDS + 7, "ids must lie in [0, 7), got 7 at index 0"),
        ("mean", zeros(3), "mean must have shape [B, num_patches]"),
        ("mean", zeros(3, 1), "must be at least 4, the length of ids"),
        ("mean", wide(3, 2), "mean must be"),
        ("inverse_std", zeros(1, 2), "inverse_std must have shape [3, 2]"),
        ("patch_size", 5, "weight must have shape"),
    ],
    "gated_rms_norm": [
        ("x", torch.tensor(1.0), "x must have shape [..., D]"),
        ("x", zeros(2, 3, 0), "D >= 1, got [2, 3, 0]"),
        ("x", zeros(2, 3, 4).long(), "x must be float16, bfloat16, float32 or float64, got"),
        ("weight", zeros(4).int(), "weight must be float16, bfloat16, float32 or float64, got"),
        ("weight", zeros(5), "weight must have shape [4], got [5]"),
        ("eps", 0.0, "eps must be positive, got 0"),
        ("eps", float("nan"), "eps must be positive, got nan"),
        ("gate", zeros(3, 4), "gate must have shape [2, 3, 4], got [3, 4]"),
        ("gate", wide(2, 3, 4), "gate must have the dtype of x"),
    ],
    "linear": [
        ("x", zeros(5), "x must have two dimensions"),
        ("x", zeros(1, 5).long(), "x must be"),
        ("weight", zeros(5), "weight must have two dimensions"),
        ("weight", zeros(4, 6), "weight must have shape"),
        ("weight", wide(4, 5), "weight must have the dtype of x"),
        ("bias", zeros(3), "bias must have shape"),
    ],
    "selective_scan": [
        ("x", zeros(2, 5), "x must be (B, L, D), got shape (2, 5)"),
        ("A", zeros(4, 2), "A must be (3, N)"),
        ("delta", zeros(2, 4, 3), "delta must have shape (2, 5, 3)"),
        ("delta", wide(2, 5, 3), "delta must be "),
        ("B", zeros(2, 5, 3), "B must have shape (2, 5, 2)"),
        ("initial_state", zeros(1, 3, 2), "initial_state must have shape (2, 3, 2)"),
    ],
    "shift_rms_norm": [
        ("x", zeros(3), "x must have shape [..., S, D]"),
        ("x", zeros(2, 3, 0), "D >= 1, got [2, 3, 0]"),
        ("x", zeros(2, 3, 4).long(), "x must be float16, bfloat16, float32 or float64, got"),
        ("weight", zeros(4).int(), "weight must be float16, bfloat16, float32 or float64, got"),
        ("weight", zeros(5), "weight must have shape [4], got [5]"),
        ("weight", zeros(1, 4), "weight must have shape [4], got [1, 4]"),
        ("eps", 0.0, "eps must be positive, got 0"),
        ("eps", float("nan"), "eps must be positive, got nan"),
        ("shift", False, "previous must be None where shift is False"),
        ("previous", zeros(2, 3), "previous must have shape [2, 2], got [2, 3]"),
        ("previous", wide(2, 2), "previous must have the dtype of x"),
    ],
    "short_attention": [
        ("q", zeros(2, 5, 3), "q must have shape [B, S, H, d]"),
        ("q", zeros(2, 5, 3, 4).long(), "q must be float16"),
        ("q", zeros(2, 7, 3, 4), "with 7 <= T <= 64, got [2, 6, 3, 4]"),
        ("k", zeros(2, 65, 3, 4), "with 5 <= T <= 64, got [2, 65, 3, 4]"),
        ("k", zeros(2, 6, 2, 4), "k must have shape [2, 6, 3, 4]"),
        ("k", wide(2, 6, 3, 4), "k must have the dtype of q"),
        ("v", zeros(2, 5, 3, 4), "v must have shape [2, 6, 3, 4]"),
        ("v", zeros(2, 6, 3, 4).half(), "v must have the dtype of q"),
        ("sin", None, "cos and sin must be given both or not at all"),
        ("cos", zeros(5, 2), "cos must have shape [6, 2], got [5, 2]"),
        ("sin", wide(6, 2), "sin must be"),
    ],
    "ssd": [
        ("x", zeros(2, 5, 3), "x must be (B, L, H, P), got shape (2, 5, 3)"),
        ("A", zeros(4), "A must have shape (3), got (4)"),
        ("dt", zeros(2, 5, 2), "dt must have shape (2, 5, 3)"),
        ("dt", wide(2, 5, 3), "dt must be "),
        ("B", zeros(2, 5), "B must be (2, 5, N)"),
        ("B", zeros(2, 4, 2), "B must have shape (2, 5, 2)"),
        ("initial_state", zeros(1, 3, 2, 2), "initial_state must have shape (2, 3, 2, 2)"),
    ],
}
for _name in ("gated_rms_norm_backward", "shift_rms_norm_backward"):
    BAD[_name] = [
        ("grad", zeros(2, 2, 4), "grad must have shape [2, 3, 4]"),
        ("grad", wide(2, 3, 4), "grad must"),
        ("inverse_norm", zeros(2), "inverse_norm must have shape [2, 3]"),
        ("inverse_norm", wide(2, 3), "inverse_norm must be"),
    ]
for _name in ("selective_scan", "ssd"):
    BAD[_name] += [
        ("x", GOOD[_name]["x"].long(), "x must be float"),
        ("A", GOOD[_name]["A"].half(), "A must be float32 or float64"),
        ("C", wide(2, 5, 2), "C must be "),
        ("D", zeros(2), "D must have shape (3)"),
        ("chunk_size", 0, "chunk_size must be at least 1, got 0"),
    ]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name: str) -> None:
    getattr(torch.ops.mblm, name)(*GOOD[name].values())
    reference_of(name)(*GOOD[name].values())


# What references refuse in their own words: shapes, dtypes, numbers that are too small.
BY_REFERENCES = re.compile(
    r"\S+ must (have (shape|the dtype|two)|be ?(float|int64|pos|at least 1|\(|$))"
)


@pytest.mark.parametrize(
    ("by", "name", "argument", "value", "words"),
    [
        pytest.param(by, name, *case, id=f"{by}-{name}-{case[0]}-{number}")
        for name, cases in BAD.items()
        for number, case in enumerate(cases)
        for by in ("kernel", "reference")
        if by == "kernel" or (case[1] is not None and BY_REFERENCES.match(case[2]))
    ],
)
def test_bad_input_is_refused(
    require_native: Callable[[str], None],
    by: str,
    name: str,
    argument: str,
    value: Any,
    words: str,
) -> None:
    arguments = {**GOOD[name], argument: value}
    if by == "kernel":
        require_native(name)
    function = getattr(torch.ops.mblm, name) if by == "kernel" else reference_of(name)
    with pytest.raises((TypeError, ValueError)) as raised:
        function(*arguments.values())
    said = str(raised.value)
    if by == "reference":
        words = words.partition(" must")[0] + " must"
    elif "scan" in name or name == "ssd":
        said = said.replace("[", "(").replace("]", ")")
    assert words in said


# By operator: what PyTorch would stretch or cut to fit.
STRETCHED: dict[str, list[tuple[str, Tensor]]] = {
    "assemble_stage": [
        ("start_token", zeros(1)),
        ("positions", zeros(1, 6)),
        ("positions", zeros(5, 1)),
        ("rotation", zeros(1, 3, 2)),
        ("context", zeros(1, 4, 6)),
        ("context", zeros(3, 1, 6)),
    ],
    "causal_conv": [
        ("weight", zeros(1, 1, 4)),
        ("bias", zeros(1)),
        ("window", zeros(2, 9, 5)),
    ],
    "embed_patches": [("bias", zeros(1))],
    "gated_rms_norm": [("weight", zeros(1)), ("weight", zeros(3, 4)), ("gate", zeros(2, 1, 4))],
    "linear": [("bias", zeros(1))],
    "selective_scan": [
        ("delta", zeros(2, 5, 1)),
        ("delta", zeros(2, 9, 3)),
        ("A", zeros(1, 2)),
        ("B", zeros(1, 5, 2)),
        ("C", zeros(1, 5, 2)),
        ("D", zeros(1)),
        ("initial_state", zeros(1, 3, 2)),
    ],
    "shift_rms_norm": [("weight", zeros(1)), ("weight", zeros(3, 4)), ("previous", zeros(1, 2))],
    "short_attention": [
        ("v", zeros(2, 6, 1, 4)),
        ("cos", zeros(1, 2)),
        ("sin", zeros(6, 1)),
    ],
    "ssd": [
        ("dt", zeros(2, 5, 1)),
        ("dt", zeros(2, 9, 3)),
        ("A", zeros(1)),
        ("C", zeros(1, 5, 2)),
        ("D", zeros(1)),
        ("initial_state", zeros(2, 1, 2, 2)),
    ],
}


@pytest.mark.parametrize("by", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        pytest.param(name, *case, id=f"{name}-{case[0]}-{number}")
        for name, cases in STRETCHED.items()
        for number, case in enumerate(cases)
    ],
)
def test_no_shape_is_stretched(
    require_native: Callable[[str], None], name: str, argument: str, value: Tensor, by: str
) -> None:
    if by == "kernel":
        require_native(name)
    function = getattr(torch.ops.mblm, name) if by == "kernel" else reference_of(name)
    with pytest.raises(ValueError, match=rf"{argument} must (have shape|be \()"):
        function(*{**GOOD[name], argument: value}.values())


def test_a_reference_says_what_shape_it_expects() -> None:
    conv, attend = reference_of("causal_conv"), reference_of("short_attention")
    with pytest.raises(ValueError, match=r"weight must have shape \[5, 1, K\], got \[5, 4\]"):
        conv(*{**GOOD["causal_conv"], "weight": zeros(5, 4)}.values())
    with pytest.raises(
        ValueError, match=r"q must have shape \[2, <= 6, 3, 4\], got \[2, 7, 3, 4\]"
    ):
        attend(*{**GOOD["short_attention"], "q": zeros(2, 7, 3, 4)}.values())


@pytest.mark.parametrize("by", ["kernel", "reference"])
def test_no_ids_are_cut_off(require_native: Callable[[str], None], by: str) -> None:
    if by == "kernel":
        require_native("embed_patches")
    run = torch.ops.mblm.embed_patches if by == "kernel" else reference_of("embed_patches")
    with pytest.raises(ValueError, match=r"at least 4, the length of ids, got 1 \* 2"):
        run(*{**GOOD["embed_patches"], "num_patches": 1}.values())


def test_an_odd_width_cannot_be_rotated(require_native: Callable[[str], None]) -> None:
    require_native("short_attention")
    x, table = zeros(1, 2, 1, 3), zeros(2, 1)
    with pytest.raises(ValueError, match="even width d for rotary positions, got 3"):
        torch.ops.mblm.short_attention(x, x, x, table, table)
    stage = (zeros(5), zeros(3, 4, 5), None, None, zeros(4, 2, 2), None, -1)
    with pytest.raises(ValueError, match=r"rotation needs an even width.*5"):
        torch.ops.mblm.assemble_stage(*stage)
