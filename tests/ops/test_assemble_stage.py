"""assemble_stage: against plain PyTorch, its gradients, its native kernel."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mblm.ops.assemble_stage import assemble_stage
from tests.ops.samples import reference_of

OPERATOR = torch.ops.mblm.assemble_stage
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TERMS = ("ids", "positions", "rotation", "context")
COMBINATIONS = [combination for n in range(5) for combination in itertools.combinations(TERMS, n)]


def sample(rows=3, length=4, width=6, terms=TERMS, dtype=torch.float32, vocabulary=5, seed=0):
    """Arguments of assemble_stage by name; only the terms asked for are there."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    angles = torch.rand(length + 2, width // 2, generator=generator, dtype=torch.float64) * 6.3
    arguments = {
        "start_token": normal(width),
        "embeddings": normal(rows, length, width),
        "ids": None,
        "positions": normal(length + 1, width),
        "rotation": torch.stack((angles.cos(), angles.sin()), dim=-1),
        "context": normal(rows, length, width),
    }
    if dtype != torch.float64:
        arguments["rotation"] = arguments["rotation"].float()
    if "ids" in terms:
        arguments["embeddings"] = normal(vocabulary, width)
        arguments["ids"] = torch.randint(vocabulary, (rows, length), generator=generator)
    return arguments | {name: None for name in set(TERMS) - set(terms)}


def plain(start_token, embeddings, ids, positions, rotation, context, padding_idx=-1):
    """The composition of PyTorch's own modules that the operator replaces."""
    if ids is not None:
        padding = padding_idx if padding_idx >= 0 else None
        embeddings = nn.functional.embedding(ids, embeddings, padding_idx=padding)
    rows, length, width = embeddings.shape
    if rotation is not None:
        turns = torch.view_as_complex(rotation[:length].to(embeddings.dtype).contiguous())
        pairs = embeddings.reshape(rows, length, width // 2, 2)
        embeddings = torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(2)
    if positions is not None:
        embeddings = embeddings + positions[:length]
    if context is not None:
        embeddings = embeddings + context
    return torch.cat((start_token.repeat(rows, 1, 1), embeddings), dim=1)


def gradients(function, arguments):
    """Gradients of a fixed weighting of the function's result, by argument."""
    arguments = {
        name: t.detach().clone().requires_grad_()
        if t is not None and t.is_floating_point() and name != "rotation"
        else t
        for name, t in arguments.items()
    }
    out = function(**arguments)
    weighting = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    out.backward(weighting)
    return {name: t.grad for name, t in arguments.items() if t is not None and t.requires_grad}


def assert_all_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().item() if theirs[name].numel() else 1.0
        torch.testing.assert_close(
            ours[name],
            theirs[name],
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("terms", COMBINATIONS, ids=lambda terms: "+".join(terms) or "plain")
def test_equals_plain_torch(terms):
    arguments = sample(terms=terms)
    torch.testing.assert_close(assemble_stage(**arguments), plain(**arguments))
    assert_all_close(gradients(assemble_stage, arguments), gradients(plain, arguments), 1e-5)


def test_each_row_starts_with_the_start_token_alone():
    arguments = sample()
    out = assemble_stage(**arguments)
    assert torch.equal(out[:, 0], arguments["start_token"].expand(3, 6))


def test_the_padding_row_gets_no_gradient():
    arguments = sample(rows=20)
    padded = gradients(lambda **a: assemble_stage(**a, padding_idx=2), arguments)
    plain_padded = gradients(lambda **a: plain(**a, padding_idx=2), arguments)
    assert not padded["embeddings"][2].any()
    assert_all_close(padded, plain_padded, 1e-5)


def test_positions_beyond_the_last_get_no_gradient():
    grads = gradients(assemble_stage, sample(length=4))
    assert grads["positions"].shape == (5, 6)
    assert grads["positions"][:4].all() and not grads["positions"][4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype):
    arguments = sample(rows=40, dtype=dtype)
    exact = {n: t if n == "ids" else t.double() for n, t in arguments.items()}
    out = assemble_stage(**arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), plain(**exact), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_other_dtypes_are_cast_to_that_of_the_embeddings():
    arguments = sample()
    for name in ("start_token", "positions", "context"):
        half = arguments[name].bfloat16().requires_grad_()
        out = assemble_stage(**arguments | {name: half})
        assert out.dtype == torch.float32
        assert torch.equal(out, assemble_stage(**arguments | {name: half.float()}))
        out.sum().backward()
        assert half.grad.dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    length=st.integers(0, 9),
    width=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512])),
    vocabulary=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    terms=st.sets(st.sampled_from(TERMS)),
    padding_idx=st.integers(-1, 3),
    transposed=st.booleans(),
)
def test_native_equals_reference(
    require_native, rows, length, width, vocabulary, dtype, terms, padding_idx, transposed
):
    require_native("assemble_stage")
    if width % 2:
        terms = terms - {"rotation"}
    arguments = sample(rows, length, width, terms, dtype, vocabulary)
    if transposed and "context" in terms:
        arguments["context"] = arguments["context"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs = (*arguments.values(), padding_idx)
    tolerance = TOLERANCE[dtype]
    out = OPERATOR(*inputs)
    torch.testing.assert_close(
        out, reference_of("assemble_stage")(*inputs), rtol=tolerance, atol=tolerance
    )

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(rows)).to(dtype)
    backward = (grad, arguments["ids"], arguments["rotation"], vocabulary, length + 1, padding_idx)
    ours = torch.ops.mblm.assemble_stage_backward(*backward)
    theirs = reference_of("assemble_stage_backward")(*backward)
    names = ("start_token", "embeddings", "positions")
    assert_all_close(
        dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), tolerance * 5
    )
