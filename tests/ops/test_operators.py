"""What holds for every operator: its contract with compilers, strides, autocast.

An operator without a sample fails.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.modes import Calls
from tests.ops.samples import ALL, GRADIENTS, IDS, SAMPLES, Sample, function_of, normal


def test_every_operator_has_a_sample() -> None:
    with_reference = {
        name.removeprefix("mblm::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mblm::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    }
    assert with_reference == {*SAMPLES, *GRADIENTS}


@ALL
def test_contract(name: str, sample: Sample) -> None:
    """As ``torch.library.opcheck`` has it, of the operator and of the one that is its gradient."""
    function, inputs = function_of(name, sample)
    leaves = [LAYOUTS["first dimension last"](t).requires_grad_() for t in inputs]
    with Calls() as recorded:
        torch.autograd.grad([r.square().sum() for r in function(*leaves)], leaves)
    assert {f"mblm::{name}", f"mblm::{name}_backward"} >= {f.name() for f, _ in recorded.calls}
    for operator, given in recorded.calls:
        given = tuple(a.detach() if isinstance(a, Tensor) else a for a in given)
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    operator, given = recorded.calls[0]
    for index in sample.differentiated:
        given[index].requires_grad_()
    others = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, given, test_utils=others)


@ALL
def test_gradients(name: str, sample: Sample) -> None:
    # A row of a table that has no gradient counts in the result: no id is of one here.
    arguments = tuple(a % 3 if a is IDS else a for a in sample.arguments)
    sample = sample._replace(arguments=arguments)
    if name == "embed_patches":  # which has one for its padding
        sample = sample._replace(differentiated=(2, 3))
    function, inputs = function_of(name, sample)
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs])


@ALL
def test_autocast_does_not_lower_the_precision(name: str, sample: Sample) -> None:
    if name.startswith("linear"):
        return  # which `mblm.ops.linear.linear` leaves to PyTorch then
    function, inputs = function_of(name, sample.to(torch.float32))

    def compute() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        results = function(*leaves)
        return (*results, *torch.autograd.grad([r.square().sum() for r in results], leaves))

    expected = compute()
    with torch.autocast("cpu", torch.bfloat16):
        actual = compute()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one value": lambda t: t.flatten()[0].expand_as(t),  # of a sum
    "a part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],  # of what was concatenated
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_and_gradients_may_be_strided(
    name: str, sample: Sample, layout: str, dtype: torch.dtype
) -> None:
    function, inputs = function_of(name, sample.to(dtype))

    def compute(laid_out: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [laid_out(t).detach().requires_grad_() for t in inputs]
        results = function(*leaves)
        given = [laid_out(normal(*r.shape).to(dtype)) for r in results]
        return (*results, *torch.autograd.grad(results, leaves, given))

    as_is = compute(LAYOUTS[layout])
    torch.testing.assert_close(as_is, compute(lambda t: LAYOUTS[layout](t).contiguous()))
