"""Every operator on every device: against float64 on the CPU, and what only a GPU can get wrong."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mblm.ops.assemble_stage import assemble_stage
from mblm.ops.causal_conv import causal_conv
from mblm.ops.embed_patches import embed_patches
from mblm.ops.gated_rms_norm import gated_rms_norm
from mblm.ops.selective_scan import selective_scan
from mblm.ops.shift_rms_norm import shift_rms_norm
from mblm.ops.short_attention import short_attention
from mblm.ops.ssd import ssd
from tests.native import GPU_KERNELS, KIND
from tests.ops.modes import Calls

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
NUM_IDS = 40


class Case(NamedTuple):
    """A call of an operator: a function of its tensors, and the tensors in float64 on the CPU."""

    function: Callable[..., Any]
    rounded: Sequence[Tensor]  # of the dtype that is asked for
    exact: Sequence[Tensor] = ()  # of the dtype that is computed in
    fixed: Sequence[Tensor | None] = ()  # ids and tables that are what they are


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make_shift_rms_norm() -> Case:
    x = normal(9, 300, 96).transpose(0, 1)
    return Case(shift_rms_norm, [x, normal(96), normal(300, 48)])


def make_shift_rms_norm_of_wide_rows() -> Case:
    """A GPU sums the gradients of the weight in no shared memory."""
    return Case(shift_rms_norm, [normal(2, 3, 3200), normal(3200), normal(2, 1600)])


def make_gated_rms_norm() -> Case:
    return Case(
        lambda x, gate, weight: gated_rms_norm(x, weight, gate),
        [normal(300, 9, 96), normal(300, 9, 96)],
        [normal(96)],
    )


def make_assemble_stage() -> Case:
    ids = torch.randint(NUM_IDS, (700, 8))
    ids[:60] = 5  # more often than a GPU sums up at once
    turns = normal(9, 24)
    rotation = torch.stack((turns.cos(), turns.sin()), dim=-1).float()
    return Case(
        lambda start, table, positions, context, ids, rotation: assemble_stage(
            start, table, ids, positions, rotation, context, padding_idx=3
        ),
        [normal(48), normal(NUM_IDS, 48), normal(8, 48), normal(700, 8, 48)],
        fixed=[ids, rotation],
    )


def make_assemble_stage_of_embeddings() -> Case:
    return Case(assemble_stage, [normal(37), normal(5, 3, 37)])


def make_embed_patches() -> Case:
    ids = torch.randint(NUM_IDS, (30, 38))
    ids[:9] = 5  # more often than a GPU sums up at once
    return Case(
        lambda table, weight, bias, ids: embed_patches(
            ids, table, weight, bias, num_patches=10, patch_size=4, pad_token_id=2
        ),
        [normal(NUM_IDS, 24), normal(96), normal(96)],
        fixed=[ids],
    )


def make_short_attention() -> Case:
    angles = normal(17, 32)
    return Case(
        lambda q, k, v, cos, sin: short_attention(q, k, v, (cos, sin)),
        [normal(40, 9, 3, 64), normal(40, 17, 3, 64), normal(40, 17, 3, 64)],
        fixed=[angles.cos().float(), angles.sin().float()],
    )


def make_causal_conv() -> Case:
    return Case(causal_conv, [normal(40, 70, 96), normal(96, 1, 4), normal(96), normal(40, 3, 96)])


def make_causal_conv_of_many_rows() -> Case:
    """As many taps as a GPU takes, and blocks that it sums the gradients of the weight over."""
    return Case(causal_conv, [normal(600, 2, 3), normal(3, 1, 24), normal(3), normal(600, 23, 3)])


def make_selective_scan(channels: int = 70, states: int = 16, chunk_size: int = 64) -> Case:
    x, steps = normal(2, 150, channels), normal(2, 150, channels).abs() / 4
    return Case(
        lambda x, B, C, delta, A, D, state: selective_scan(  # noqa: N803
            x, delta, -A.abs(), B, C, D, state, chunk_size=chunk_size
        ),
        [x, normal(2, 150, states), normal(2, 150, states)],
        [steps, normal(channels, states), normal(channels), normal(2, channels, states)],
    )


def make_selective_scan_of_long_chunks() -> Case:
    """As many states as a GPU takes, more of which it keeps than shared memory holds."""
    return make_selective_scan(3, 128, 140)


def make_ssd(
    shape: Sequence[int] = (2, 150, 3, 20), states: int = 24, chunk_size: int = 64
) -> Case:
    rows, length, heads, head_dim = shape
    x, steps = normal(*shape), normal(rows, length, heads).abs() / 4
    return Case(
        lambda x, B, C, dt, A, D, state: ssd(  # noqa: N803
            x, dt, -A.abs(), B, C, D, state, chunk_size=chunk_size
        ),
        [x, normal(rows, length, states), normal(rows, length, states)],
        [steps, normal(heads), normal(heads), normal(rows, heads, head_dim, states)],
    )


def make_ssd_of_several_tiles() -> Case:
    """Of the matrices that a GPU multiplies."""
    return make_ssd((1, 75, 1, 70), 66, 70)


MAKERS = {
    maker.__name__.removeprefix("make_"): maker
    for maker in (
        make_shift_rms_norm,
        make_shift_rms_norm_of_wide_rows,
        make_gated_rms_norm,
        make_assemble_stage,
        make_assemble_stage_of_embeddings,
        make_embed_patches,
        make_short_attention,
        make_causal_conv,
        make_causal_conv_of_many_rows,
        make_selective_scan,
        make_selective_scan_of_long_chunks,
        make_ssd,
        make_ssd_of_several_tiles,
    )
}
CASES = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def tensors_of(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """The differentiable tensors on the device, rounded once from float64, and the others."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [t.to(device, dtype) for t in case.rounded] + [t.to(device, exact) for t in case.exact]
    fixed = [t if t is None else t.to(device) for t in case.fixed]
    return [t.detach().requires_grad_() for t in inputs], fixed


def results(case: Case, inputs: Sequence[Tensor], fixed: Sequence[Any]) -> list[Tensor]:
    """What the call gives, and the gradients of a weighting of it."""
    given = case.function(*inputs, *fixed)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    weightings = [
        torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).to(out.dtype)
        for out in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weightings)]


@DEVICES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@CASES
def test_equals_float64_on_the_cpu(
    device: str, dtype: torch.dtype, make: Callable[[], Case]
) -> None:
    check_against_float64(make(), device, dtype, TOLERANCE[dtype])


def check_against_float64(
    case: Case, device: str, dtype: torch.dtype, tolerance: float
) -> list[Tensor]:
    inputs, fixed = tensors_of(case, device, dtype)
    ours = results(case, inputs, fixed)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    theirs = results(case, exact, [None if t is None else t.cpu() for t in fixed])
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.device.type == device and one.isfinite().all()
        bound = tolerance * max(1.0, other.abs().max().item())
        error = (one.cpu().double() - other).abs().max().item()
        assert error <= bound, f"result {index} is off by {error}, {bound} is allowed"
    return ours


@DEVICES
@CASES
def test_runs_give_the_same_bits_for_any_number_of_threads(
    require_native: Callable[[str], None], device: str, make: Callable[[], Case]
) -> None:
    if device == "cpu":
        require_native(make.__name__.removeprefix("make_").partition("_of_")[0])
    case = make()
    inputs, fixed = tensors_of(case, device, torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(case, inputs, fixed))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@DEVICES
@CASES
def test_operator_contract(device: str, make: Callable[[], Case]) -> None:
    """What is given has the shapes, dtypes and strides that were promised to compilers."""
    case = make()
    inputs, fixed = tensors_of(case, device, torch.bfloat16)
    with Calls() as recorded:
        results(case, inputs, fixed)
    assert recorded.calls
    for operator, arguments in recorded.calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class TestKernelsOfAGpu:
    """Emulated, too."""

    pytestmark = GPU_KERNELS

    def test_products_may_be_rounded(self) -> None:
        case, matmul = make_ssd_of_several_tiles(), torch.backends.cuda.matmul
        exact = check_against_float64(case, KIND, torch.float32, 1e-4)
        before = matmul.allow_tf32
        try:
            matmul.allow_tf32 = True
            rounded = check_against_float64(case, KIND, torch.float32, 1e-3)
        finally:
            matmul.allow_tf32 = before
        assert not torch.equal(rounded[0], exact[0])

    @pytest.mark.parametrize("outside", [-1, NUM_IDS, 1 << 62])
    def test_ids_outside_the_table_give_nan(self, outside: int) -> None:
        ids = torch.zeros(2, 4, dtype=torch.int64, device=KIND)
        ids[1, 2] = outside
        table = torch.ones(NUM_IDS, 8, device=KIND, requires_grad=True)
        out = assemble_stage(torch.ones(8, device=KIND), table, ids)
        assert out[1, 3].isnan().all() and out.isnan().sum() == 8
        patches = embed_patches(
            ids,
            table,
            torch.ones(16, device=KIND),
            torch.ones(16, device=KIND),
            num_patches=2,
            patch_size=2,
            pad_token_id=0,
        )
        assert patches[1, 1].isnan().all() and patches.isnan().sum() == 16
        (out.sum() + patches.sum()).backward()
        assert table.grad is not None
        table.grad.cpu()  # waits for the kernels


class TestGpu:
    """What makes sense on a GPU only."""

    pytestmark = ON_GPU

    @pytest.mark.parametrize("name", sorted(name for name in MAKERS if "_of_" not in name))
    def test_kernels_are_compiled(self, name: str) -> None:
        for operator in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mblm::{operator}", "CUDA")

    @CASES
    def test_gradcheck(self, make: Callable[[], Case]) -> None:
        case = make()
        inputs, fixed = tensors_of(case, "cuda", torch.float64)
        assert torch.autograd.gradcheck(
            lambda *tensors: case.function(*tensors, *fixed), inputs, fast_mode=True
        )

    @CASES
    def test_any_stream(self, make: Callable[[], Case]) -> None:
        """Work on a stream waits for what came before on it, and for nothing else."""
        case = make()
        inputs, fixed = tensors_of(case, "cuda", torch.float32)
        expected = results(case, inputs, fixed)
        streams = [torch.cuda.Stream() for _ in range(3)]
        got = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                late = [t.detach().mul(1.0).requires_grad_() for t in inputs]
                got.append(results(case, late, fixed))
        torch.cuda.synchronize()
        for one in got:
            assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))

    @CASES
    def test_graph_capture(self, make: Callable[[], Case]) -> None:
        """Forward and backward pass are captured, and replayed with other values."""
        case = make()
        inputs, fixed = tensors_of(case, "cuda", torch.float32)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results(case, inputs, fixed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(case, inputs, fixed)
        with torch.no_grad():
            for tensor in inputs:
                tensor.mul_(0.5)
        graph.replay()
        expected = results(case, inputs, fixed)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_tensors_on_two_devices_are_refused(self) -> None:
        with pytest.raises(ValueError, match="weight must be on the device of x, cuda"):
            shift_rms_norm(torch.zeros(2, 3, 4, device="cuda"), torch.zeros(4))

    @pytest.mark.parametrize("operator", ["shift_rms_norm", "assemble_stage", "causal_conv"])
    def test_more_than_two_to_the_31_values(self, operator: str) -> None:
        """The last row of a very large tensor gives what it gives alone."""
        length, width = 64, 4096
        rows = 2**31 // (length * width) + 3
        if torch.cuda.mem_get_info()[0] < 30 * 2**30:
            pytest.skip("needs 30 GiB of GPU memory")
        x = torch.zeros(rows, length, width, device="cuda", dtype=torch.bfloat16)
        x[-1] = torch.randn(length, width, device="cuda")

        def call(x: Tensor) -> Tensor:
            vector = torch.linspace(-1, 1, width, device="cuda", dtype=x.dtype)
            if operator == "shift_rms_norm":
                return shift_rms_norm(x, vector)
            if operator == "assemble_stage":
                return assemble_stage(vector, x)
            return causal_conv(x, vector[:, None, None].expand(-1, 1, 4), vector)[0]

        alone = x[-1:].clone().requires_grad_()
        (expected,) = torch.autograd.grad(call(alone).square().sum(), alone)
        x.requires_grad_()
        out = call(x)
        assert torch.equal(out[-1], call(alone)[0])
        weighting = torch.zeros_like(out)
        weighting[-1] = 2 * out[-1]
        (grad,) = torch.autograd.grad(out, x, weighting)
        torch.testing.assert_close(grad[-1:], expected)
