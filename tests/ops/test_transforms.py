"""Every operator under every way that PyTorch derives one function from another.

Each is right, or refused by name.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops.samples import ALL, IDS, Function, Sample, function_of, normal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's


def scalar_of(name: str, sample: Sample) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A number that depends on every result of the operator, of the second order too."""
    function, inputs = function_of(name, sample)
    return lambda *given: torch.stack([r.sin().sum() for r in function(*given)]).sum(), inputs


def directions(sample: Sample, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One for every input, 0 where a table's row gets no gradient."""
    found = [normal(*t.shape).roll(1) for t in inputs]
    if sample.arguments[0] is IDS:
        found[0][4] = 0
    if any(argument is IDS for argument in sample.arguments[1:]):
        found[1][3] = 0
    return tuple(found)


def by_differences(function: Function, inputs: Any, along: Any) -> Iterator[Tensor]:
    step = 1e-6
    ends = [
        function(*(t + sign * step * d for t, d in zip(inputs, along, strict=True)))
        for sign in (1, -1)
    ]
    return ((a - b) / (2 * step) for a, b in zip(*ends, strict=True))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), atol=1e-7, rtol=1e-5)


@ALL
def test_forward_mode(name: str, sample: Sample) -> None:
    function, inputs = function_of(name, sample)
    along = directions(sample, inputs)
    expected = list(by_differences(function, inputs, along))

    results, tangents = torch.func.jvp(function, inputs, along)
    assert_close(results, function(*inputs))
    assert_close(tangents, expected)

    for gradients in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
            duals = function(*map(forward_ad.make_dual, inputs, along))
            assert_close((forward_ad.unpack_dual(dual).tangent for dual in duals), expected)


@ALL
def test_gradients_of_torch_func(name: str, sample: Sample) -> None:
    scalar, inputs = scalar_of(name, sample)
    indices = tuple(range(len(inputs)))
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(scalar(*leaves), leaves)
    assert_close(torch.func.grad(scalar, indices)(*inputs), expected)


@ALL
@pytest.mark.parametrize("transform", ["alone", "gradients"])
def test_vmap(name: str, sample: Sample, transform: str) -> None:
    """Over all inputs, and over the first alone."""
    function, inputs = function_of(name, sample)
    if transform == "gradients":
        function = torch.func.grad(scalar_of(name, sample)[0], tuple(range(len(inputs))))
    for mapped in (len(inputs), 1):
        batches = [torch.stack([t, t * 1.1, t * 0.9]) for t in inputs[:mapped]]
        dims = (0,) * mapped + (None,) * (len(inputs) - mapped)
        actual = torch.vmap(function, dims)(*batches, *inputs[mapped:])
        each = [function(*(b[i] for b in batches), *inputs[mapped:]) for i in range(3)]
        assert_close(actual, map(torch.stack, zip(*each, strict=True)))


@ALL
def test_second_derivatives(name: str, sample: Sample) -> None:
    """By autograd, whose first ones are then plain PyTorch's, and by torch.func."""
    scalar, inputs = scalar_of(name, sample)
    leaves = [t.clone().requires_grad_() for t in inputs]
    plain = torch.autograd.grad(scalar(*leaves), leaves)
    graphed = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
    assert_close(graphed, plain)

    along = directions(sample, inputs)
    slope = torch.stack([(g * d).sum() for g, d in zip(graphed, along, strict=True)]).sum()
    found = torch.autograd.grad(slope, leaves, allow_unused=True)
    second = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

    gradients = torch.func.grad(scalar, tuple(range(len(inputs))))
    expected = list(by_differences(gradients, inputs, along))
    if name == "embed_patches":
        second[0][4] = expected[0][4] = 0
    assert_close(second, expected)
    forward_over_reverse = list(torch.func.jvp(gradients, inputs, along)[1])
    if name == "embed_patches":
        forward_over_reverse[0][4] = 0
    assert_close(forward_over_reverse, expected)


@ALL
def test_gradients_in_a_batch(name: str, sample: Sample) -> None:
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` takes them."""
    function, inputs = function_of(name, sample)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)[0]
    given = normal(3, *out.shape)
    batched = torch.autograd.grad(
        out, leaves, given, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    each = [
        torch.autograd.grad(out, leaves, g, retain_graph=True, allow_unused=True) for g in given
    ]
    for actual, expected in zip(batched, zip(*each, strict=True), strict=True):
        assert (actual is None) == (expected[0] is None)
        if actual is not None:
            torch.testing.assert_close(actual, torch.stack(expected))


def test_a_tensor_given_twice_has_the_gradients_of_both() -> None:
    x = normal(1, 3, 1, 4).requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        out = torch.ops.mblm.short_attention(x, x, x, None, None).sin().sum()
        return torch.autograd.grad(out, x, create_graph=create_graph)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_second_derivatives_of_rows_of_zeros_are_finite() -> None:
    x = normal(1, 3, 4)
    x[0, 1] = 0
    x.requires_grad_()
    out = torch.ops.mblm.shift_rms_norm(x, normal(4), None, False, 1e-8)[0]
    (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad[0, 0].sum(), x)
    assert second.isfinite().all() and second[0, 0].any()


def test_a_gradient_operator_called_by_itself_is_refused() -> None:
    q = normal(1, 3, 1, 4)

    def call(grad: Tensor) -> Tensor:
        grads = torch.ops.mblm.short_attention_backward(grad, q, q, q, None, None)
        return grads[0].sum()

    for derive in (torch.autograd.functional.jacobian, lambda f, x: torch.func.grad(f)(x)):
        with pytest.raises(NotImplementedError, match="short_attention_backward has no deriv"):
            derive(call, q)
