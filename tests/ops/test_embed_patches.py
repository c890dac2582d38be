"""embed_patches: against plain PyTorch, its gradients, its native kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mblm.ops.embed_patches import embed_patches
from tests.ops.samples import reference_of

OPERATOR = torch.ops.mblm.embed_patches
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PAD = 2


def sample(batch, length, patch_size, width, vocabulary=7, dtype=torch.float32, seed=0):
    """``ids, table, weight, bias``; one id in three or so is the pad token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    flat = patch_size * width
    return ids, normal(vocabulary, width), normal(flat) + 1, normal(flat)


def plain(ids, table, weight, bias, *, num_patches, patch_size, pad_token_id, eps=1e-5):
    """The composition of PyTorch's own modules that the operator replaces."""
    padded = nn.functional.pad(
        ids, (0, num_patches * patch_size - ids.shape[1]), value=pad_token_id
    )
    nested = padded.reshape(ids.shape[0], num_patches, patch_size)
    flat = nn.functional.embedding(nested, table, padding_idx=pad_token_id).flatten(2)
    return nn.functional.layer_norm(flat, weight.shape, weight, bias, eps)


def gradients(function, ids, *tensors, **sizes):
    """Gradients of a fixed weighting of the function's result."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(ids, *tensors, **sizes)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [t.grad for t in tensors]


def assert_all_close(ours, theirs, tolerance, terms=0.001):
    """Errors are relative to a gradient's largest entry, or to its terms where they cancel out."""
    for name, one, other in zip(("table", "weight", "bias"), ours, theirs, strict=True):
        scale = max(other.abs().max().item(), terms) if other.numel() else terms
        torch.testing.assert_close(
            one,
            other,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(
    ("batch", "length", "num_patches", "patch_size", "width"),
    [
        pytest.param(2, 12, 3, 4, 5, id="full"),
        pytest.param(2, 10, 3, 4, 5, id="part of a patch"),
        pytest.param(2, 3, 3, 4, 5, id="whole patches of padding"),
        pytest.param(2, 0, 2, 4, 5, id="nothing but padding"),
        pytest.param(2, 0, 0, 4, 5, id="no patch"),
        pytest.param(0, 8, 2, 4, 5, id="no row"),
        pytest.param(1, 1, 1, 1, 6, id="one id"),
        pytest.param(3, 4, 4, 1, 6, id="patches of one"),
        pytest.param(4, 60, 8, 8, 64, id="larger"),
    ],
)
def test_equals_plain_torch(batch, length, num_patches, patch_size, width):
    inputs = sample(batch, length, patch_size, width)
    sizes = {"num_patches": num_patches, "patch_size": patch_size, "pad_token_id": PAD}
    out = embed_patches(*inputs, **sizes)
    assert out.shape == (batch, num_patches, patch_size * width)
    torch.testing.assert_close(out, plain(*inputs, **sizes), rtol=1e-5, atol=1e-5)
    assert_all_close(
        gradients(embed_patches, *inputs, **sizes), gradients(plain, *inputs, **sizes), 2e-5
    )


def test_the_pad_row_counts_but_gets_no_gradient():
    inputs = sample(2, 9, 4, 3)
    sizes = {"num_patches": 3, "patch_size": 4, "pad_token_id": PAD}
    assert (inputs[0] == PAD).any()
    other = inputs[1].clone()
    other[PAD] += 1
    assert not torch.equal(
        embed_patches(*inputs, **sizes), embed_patches(inputs[0], other, *inputs[2:], **sizes)
    )
    assert not gradients(embed_patches, *inputs, **sizes)[0][PAD].any()


def test_moments_are_accurate_far_from_zero():
    """A mean a thousand times the deviation costs a naive sum most of its digits."""
    ids, table, weight, bias = sample(2, 2048, 1024, 64, vocabulary=200)
    table += 1000
    sizes = {"num_patches": 2, "patch_size": 1024, "pad_token_id": PAD}
    out = embed_patches(ids, table, weight, bias, **sizes)
    exact = plain(ids, table.double(), weight.double(), bias.double(), **sizes)
    # The normalized values carry the mean's rounding, 1000 * 2**-24, itself.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-3)


def test_a_constant_patch_is_its_bias():
    ids, table, weight, bias = sample(1, 4, 4, 3)
    table[:] = 0.3
    out = embed_patches(ids, table, weight, bias, num_patches=1, patch_size=4, pad_token_id=0)
    torch.testing.assert_close(out[0, 0], bias, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype):
    inputs = sample(3, 30, 8, 16, dtype=dtype)
    sizes = {"num_patches": 4, "patch_size": 8, "pad_token_id": PAD}
    out = embed_patches(*inputs, **sizes)
    assert out.dtype == dtype
    exact = plain(inputs[0], *(t.double() for t in inputs[1:]), **sizes)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert all(grad.dtype == dtype for grad in gradients(embed_patches, *inputs, **sizes))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    num_patches=st.integers(0, 9),
    patch_size=st.one_of(st.integers(1, 9), st.just(35)),
    missing=st.integers(0, 20),
    width=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 512])),
    vocabulary=st.integers(PAD + 1, 300),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_native_equals_reference(
    require_native, batch, num_patches, patch_size, missing, width, vocabulary, dtype
):
    require_native("embed_patches")
    length = max(num_patches * patch_size - missing, 0)
    ids, table, weight, bias = sample(batch, length, patch_size, width, vocabulary, dtype)
    inputs = (ids, table, weight, bias, num_patches, patch_size, PAD, 1e-5)
    tolerance = TOLERANCE[dtype]
    out, mean, inverse_std = OPERATOR(*inputs)
    expected, expected_mean, expected_std = reference_of("embed_patches")(*inputs)
    # A patch of few values may have next to no variance: errors grow with 1 / std.
    scale = max(expected_std.max().item(), 1.0) if expected_std.numel() else 1.0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inverse_std, expected_std, rtol=1e-5 * scale, atol=0)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(length)).to(dtype)
    backward = (grad, ids, table, weight, expected_mean, expected_std, patch_size, PAD)
    ours = torch.ops.mblm.embed_patches_backward(*backward)
    theirs = reference_of("embed_patches_backward")(*backward)
    # A term is grad * weight / std, times a normalized value whose own error has another 1 / std.
    terms = 2 * weight.abs().max().item() * scale**2
    assert_all_close(ours, theirs, tolerance, terms)


def test_a_row_does_not_depend_on_its_neighbors():
    """Few ids and many take different ways through the moments but give equal bits."""
    ids, *tensors = sample(20, 16, 8, 24, vocabulary=40)
    sizes = {"num_patches": 2, "patch_size": 8, "pad_token_id": PAD}
    together = embed_patches(ids, *tensors, **sizes)
    for row in range(20):
        alone = embed_patches(ids[row : row + 1], *tensors, **sizes)
        assert torch.equal(alone[0], together[row])
