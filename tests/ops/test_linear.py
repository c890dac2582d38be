"""``linear``: the operator against the reference, and which way a product takes."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mblm.model.linear import apply
from mblm.ops import linear as module
from mblm.ops.linear import MAX_ROWS, add_outer_products, linear, linear_reference
from tests.model.peak_memory import peak_bytes

TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}

# What gives a tensor the memory layout of one with other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "rows apart": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "columns apart": lambda t: t.repeat_interleave(3, 1)[:, ::3],
    "transposed, apart": lambda t: torch.cat([t, t]).t().contiguous().t()[: t.shape[0]],
}


@pytest.fixture
def native(require_native: Callable[[str], None]) -> None:
    require_native("linear")


class TestOperator:
    @given(
        rows=st.integers(0, 40),
        inputs=st.integers(0, 70),
        outputs=st.integers(0, 40),
        dtype=st.sampled_from(list(TOLERANCE)),
        with_bias=st.booleans(),
        layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    )
    @settings(max_examples=150, deadline=None)
    def test_equals_the_reference(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        with_bias: bool,
        layouts: tuple[str, str],
    ) -> None:
        x = LAYOUTS[layouts[0]](torch.randn(rows, inputs).to(dtype))
        weight = LAYOUTS[layouts[1]](torch.randn(outputs, inputs).to(dtype))
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        exact = linear_reference(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        actual = torch.ops.mblm.linear(x, weight, bias)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, **TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_one_of_few_rows_has_the_same_bits_alone_and_among_others(
        self, native: None, dtype: torch.dtype
    ) -> None:
        x, weight = torch.randn(MAX_ROWS, 333).to(dtype), torch.randn(77, 333).to(dtype)
        together = torch.ops.mblm.linear(x, weight, None)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            alone = torch.cat([torch.ops.mblm.linear(row[None], weight, None) for row in x])
            torch.set_num_threads(before)
            assert torch.equal(together, alone)

    @pytest.mark.parametrize("expanded", ["x", "weight"])
    @pytest.mark.parametrize("shape", [(1, 20), (30, 1)])
    def test_repeated_without_memory(self, expanded: str, shape: tuple[int, int]) -> None:
        repeated, other = torch.randn(shape).expand(30, 20), torch.randn(25, 20)
        x, weight = (repeated, other) if expanded == "x" else (other, repeated)
        exact = x.double() @ weight.double().T
        actual = torch.ops.mblm.linear(x, weight, None)
        torch.testing.assert_close(actual.double(), exact, **TOLERANCE[torch.float32])

    @pytest.mark.parametrize("x_layout", LAYOUTS)
    @pytest.mark.parametrize("weight_layout", LAYOUTS)
    def test_onednn_is_given_what_it_is_fast_with(
        self, native: None, capfd: pytest.CaptureFixture[str], x_layout: str, weight_layout: str
    ) -> None:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this PyTorch has no oneDNN")
        x = LAYOUTS[x_layout](torch.randn(40, 33))
        weight = LAYOUTS[weight_layout](torch.randn(50, 33))
        bias = torch.randn(50, 2)[:, 0]
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            torch.ops.mblm.linear(x, weight, bias)
        (said,) = [line for line in capfd.readouterr().out.splitlines() if "inner_product" in line]
        assert ",ref" not in said  # its plain loop, a thousand times slower

    def test_gradients_of_float32(self) -> None:
        inputs = [torch.randn(s, requires_grad=True) for s in ((70, 33), (65, 33), (65,))]
        of_out = torch.randn(65, 70).t()  # strided, as gradients may be
        actual = torch.autograd.grad(torch.ops.mblm.linear(*inputs), inputs, of_out)
        exact = torch.autograd.grad(
            F.linear(*(t.double() for t in inputs)), inputs, of_out.double()
        )
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-5)

    def test_only_the_gradients_asked_for_are_made(self) -> None:
        x, weight = torch.randn(5, 7), torch.randn(3, 7, requires_grad=True)
        torch.ops.mblm.linear(x, weight, None).sum().backward()
        assert x.grad is None
        torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 7))


class _Recorder:
    """Stands for ``torch.ops.mblm``: the rows of each call of the operator."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._operators = torch.ops.mblm

    def linear(self, x: Tensor, *rest: Tensor) -> Tensor:
        self.calls.append(x.shape[0])
        out: Tensor = self._operators.linear(x, *rest)
        return out


class TestChoice:
    """A layer equals ``torch.nn.Linear`` whatever way it takes."""

    @pytest.fixture
    def calls(self, native: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        recorder = _Recorder()
        monkeypatch.setattr(module.torch.ops, "mblm", recorder)
        return recorder.calls

    @pytest.fixture
    def any_is_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a machine where oneDNN is faster, for products of any size."""
        monkeypatch.setattr(module, "_LARGE", 1)
        monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)

    @pytest.mark.parametrize("shape", [(1, 6), (2, 4, 6), (6,), (1, 1, 6)])
    @torch.inference_mode()
    def test_few_rows(self, calls: list[int], shape: tuple[int, ...]) -> None:
        layer, x = nn.Linear(6, 5), torch.randn(shape)
        torch.testing.assert_close(apply(layer, x), F.linear(x, layer.weight, layer.bias))
        assert calls == [x.numel() // 6]

    @torch.inference_mode()
    def test_few_rows_of_a_transposed_weight(self, calls: list[int]) -> None:
        x, weight = torch.randn(2, 6), torch.randn(6, 5).T
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        assert calls == []  # the kernel would copy the weight

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("shape", [(9, 6), (3, 4, 6)])
    def test_a_large_product(
        self,
        calls: list[int],
        any_is_large: None,
        shape: tuple[int, ...],
        gradients: bool,
    ) -> None:
        layer, x = nn.Linear(6, 5), torch.randn(shape)
        with torch.set_grad_enabled(gradients):
            actual = apply(layer, x)
        torch.testing.assert_close(actual, F.linear(x, layer.weight, layer.bias))
        assert calls == [x.numel() // 6]
        assert actual.requires_grad == gradients

    @pytest.mark.filterwarnings("ignore:TF32")  # of a switch that flags() sets too
    @pytest.mark.parametrize(
        "why_not", ["small", "double", "autocast", "turned off", "no rows", "few, with gradients"]
    )
    def test_pytorch_has_the_rest(
        self,
        calls: list[int],
        any_is_large: None,
        monkeypatch: pytest.MonkeyPatch,
        why_not: str,
    ) -> None:
        layer, x = nn.Linear(6, 5), torch.randn(MAX_ROWS + 1, 6)
        context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if why_not == "small":
            monkeypatch.setattr(module, "_LARGE", 9 * 6 * 5 + 1)
        elif why_not == "double":
            layer, x = layer.double(), x.double()
        elif why_not == "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        elif why_not == "turned off":
            context = torch.backends.mkldnn.flags(enabled=False)
        elif why_not == "no rows":
            x = x[:0]
        else:
            x = x[:MAX_ROWS]
        with context:
            out = apply(layer, x)
            torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
        out.sum().backward()
        assert layer.weight.grad is not None
        assert calls == []

    def test_a_tensor_that_is_more_than_one_keeps_its_own_way(
        self, calls: list[int], any_is_large: None
    ) -> None:
        class Special(Tensor):
            pass

        x, weight = torch.randn(9, 6), torch.randn(5, 6)
        assert type(linear(x, weight.as_subclass(Special))) is Special
        assert type(linear(x.as_subclass(Special), weight)) is Special
        assert calls == []

    @pytest.mark.parametrize("x", [torch.zeros(9, 7), torch.zeros(1, 7), torch.zeros(())])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_what_does_not_fit_is_refused_as_torch_does(
        self, calls: list[int], any_is_large: None, x: Tensor, gradients: bool
    ) -> None:
        layer = nn.Linear(6, 5)
        with torch.set_grad_enabled(gradients):
            with pytest.raises(RuntimeError) as expected:
                F.linear(x, layer.weight, layer.bias)
            with pytest.raises(RuntimeError) as actual:
                apply(layer, x)
        assert str(actual.value) == str(expected.value)
        assert calls == []

    @pytest.mark.parametrize("large", [False, True])
    def test_added_outer_products(
        self, calls: list[int], monkeypatch: pytest.MonkeyPatch, large: bool
    ) -> None:
        monkeypatch.setattr(module, "_LARGE", 1 if large else 2**40)
        monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)
        to, a, b = torch.randn(5, 6), torch.randn(9, 5), torch.randn(9, 6)
        expected = to + a.T @ b
        add_outer_products(to, a, b)
        torch.testing.assert_close(to, expected)
        assert calls == ([5] if large else [])

    def test_outer_products_are_added_in_parts(self, native: None, any_is_large: None) -> None:
        to, a, b = torch.zeros(1000, 50), torch.randn(9, 1000), torch.randn(9, 50)
        assert peak_bytes(lambda: add_outer_products(to, a, b)) < to.nbytes / 2
        torch.testing.assert_close(to, a.T @ b)
