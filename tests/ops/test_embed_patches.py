"""embed_patches: against plain PyTorch, its gradients, its native kernel, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mblm.ops.embed_patches as module
from mblm.ops.embed_patches import embed_patches, embed_patches_reference
from tests.ops.threads import assert_same_bits_for_any_threads

OPERATOR = torch.ops.mblm.embed_patches
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [OPERATOR, embed_patches_reference], ids=["operator", "reference"]
)
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


@pytest.mark.parametrize("length", [0, 5, 8])
def test_gradcheck(length):
    ids, *tensors = sample(2, length, 4, 3, dtype=torch.float64)
    sizes = {"num_patches": 2, "patch_size": 4, "pad_token_id": PAD}
    # The pad row takes part in the result but has no gradient, so it is left out here.
    ids = ids.masked_fill(ids == PAD, PAD + 1)
    if length < 8:
        tensors = [t.requires_grad_(i > 0) for i, t in enumerate(tensors)]
    else:
        tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: embed_patches(ids, *t, **sizes), tensors)


@pytest.mark.parametrize("length", [0, 5, 8])
def test_reference_gradient_is_that_of_the_reference(length):
    ids, *tensors = sample(2, length, 4, 3, dtype=torch.float64)
    table, weight, bias = (t.requires_grad_() for t in tensors)
    out, mean, inverse_std = embed_patches_reference(ids, table, weight, bias, 2, 4, PAD, 1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = list(torch.autograd.grad(out, (table, weight, bias), grad))
    expected[0][PAD] = 0
    with torch.no_grad():
        ours = module.embed_patches_backward_reference(
            grad, ids, table, weight, mean, inverse_std, 4, PAD
        )
    torch.testing.assert_close(list(ours), expected)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    num_patches=st.integers(0, 9),
    patch_size=st.integers(1, 9),
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
    expected, expected_mean, expected_std = embed_patches_reference(*inputs)
    # A patch of few values may have next to no variance: errors grow with 1 / std.
    scale = max(expected_std.max().item(), 1.0) if expected_std.numel() else 1.0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inverse_std, expected_std, rtol=1e-5 * scale, atol=0)

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(length)).to(dtype)
    backward = (grad, ids, table, weight, expected_mean, expected_std, patch_size, PAD)
    ours = torch.ops.mblm.embed_patches_backward(*backward)
    theirs = module.embed_patches_backward_reference(*backward)
    # A term is grad * weight / std, times a normalized value whose own error has another 1 / std.
    terms = 2 * weight.abs().max().item() * scale**2
    assert_all_close(ours, theirs, tolerance, terms)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = sample(30, 130, 8, 98, vocabulary=50)
    sizes = {"num_patches": 17, "patch_size": 8, "pad_token_id": PAD}

    def compute():
        grads = gradients(embed_patches, *inputs, **sizes)
        return [embed_patches(*inputs, **sizes), *grads]

    assert_same_bits_for_any_threads(compute)


def test_a_row_does_not_depend_on_its_neighbors():
    """Few ids and many take different ways through the moments but give equal bits."""
    ids, *tensors = sample(20, 16, 8, 24, vocabulary=40)
    sizes = {"num_patches": 2, "patch_size": 8, "pad_token_id": PAD}
    together = embed_patches(ids, *tensors, **sizes)
    for row in range(20):
        alone = embed_patches(ids[row : row + 1], *tensors, **sizes)
        assert torch.equal(alone[0], together[row])


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(2, 7)}, TypeError, "ids must be int64, got"),
        ({"ids": torch.zeros(7).long()}, ValueError, r"ids must have two dimensions, got \[7\]"),
        (
            {"ids": torch.tensor([[0, 1], [7, 8]])},
            ValueError,
            r"ids must lie in \[0, 7\), got 7 at index 2",
        ),
        ({"ids": torch.tensor([[-3]])}, ValueError, r"ids must lie in \[0, 7\), got -3 at index 0"),
        (
            {"table": torch.zeros(7, 3).int()},
            TypeError,
            "table must be float16, bfloat16, float32 or float64, got",
        ),
        ({"table": torch.zeros(7)}, ValueError, r"table must have shape \[V, D\].*got \[7\]"),
        ({"table": torch.zeros(7, 0)}, ValueError, r"D >= 1, got \[7, 0\]"),
        ({"weight": torch.zeros(11)}, ValueError, r"weight must have shape \[12\], got \[11\]"),
        (
            {"weight": torch.zeros(12).double()},
            TypeError,
            "weight must have the dtype of table",
        ),
        ({"bias": torch.zeros(4, 3)}, ValueError, r"bias must have shape \[12\], got \[4, 3\]"),
        ({"bias": torch.zeros(12).double()}, TypeError, "bias must have the dtype of table"),
        ({"num_patches": 1}, ValueError, "must be at least 7, the length of ids, got 1 [*] 4"),
        ({"num_patches": -1}, ValueError, "must be at least 7, the length of ids, got -1 [*] 4"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"pad_token_id": 7}, ValueError, r"pad_token_id must lie in \[0, 7\), got 7"),
        ({"pad_token_id": -1}, ValueError, r"pad_token_id must lie in \[0, 7\), got -1"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(implementation, change, error, message):
    ids, table, weight, bias = sample(2, 7, 4, 3)
    arguments = {
        "ids": ids,
        "table": table,
        "weight": weight,
        "bias": bias,
        "num_patches": 2,
        "patch_size": 4,
        "pad_token_id": PAD,
        "eps": 1e-5,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())


@IMPLEMENTATIONS
def test_a_patch_size_that_overflows_is_refused(implementation):
    """2**62 + 1 times 4 is 4 in 64 bits."""
    ids, table, weight, bias = sample(2, 0, 1, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        implementation(ids, table, weight, bias, 1, 2**62 + 1, PAD, 1e-5)


@pytest.mark.parametrize(
    "implementation",
    [torch.ops.mblm.embed_patches_backward, module.embed_patches_backward_reference],
    ids=["operator", "reference"],
)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 2, 11)}, ValueError, r"grad must have shape \[2, 2, 12\]"),
        ({"grad": torch.zeros(2, 2, 12).double()}, TypeError, "grad must have the dtype of table"),
        ({"ids": torch.full((2, 7), 7)}, ValueError, r"ids must lie in \[0, 7\), got 7 at index 0"),
        ({"mean": torch.zeros(2)}, ValueError, r"mean must have shape \[B, num_patches\]"),
        ({"mean": torch.zeros(2, 1)}, ValueError, "must be at least 7, the length of ids"),
        ({"mean": torch.zeros(2, 2).double()}, TypeError, "mean must be"),
        ({"inverse_std": torch.zeros(1, 2)}, ValueError, r"inverse_std must have shape \[2, 2\]"),
        ({"patch_size": 5}, ValueError, r"weight must have shape \[15\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_to_the_gradient_is_refused(implementation, change, error, message):
    ids, table, weight, _ = sample(2, 7, 4, 3)
    arguments = {
        "grad": torch.zeros(2, 2, 12),
        "ids": ids,
        "table": table,
        "weight": weight,
        "mean": torch.zeros(2, 2),
        "inverse_std": torch.ones(2, 2),
        "patch_size": 4,
        "pad_token_id": PAD,
    } | change
    with pytest.raises(error, match=message):
        implementation(*arguments.values())
