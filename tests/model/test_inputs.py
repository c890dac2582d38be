"""Tensors that public functions take may be of any dtype that fits, and strided at will."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mblm import MBLMReturnType
from tests.models import encoder, mamba, model, transformer

LOSS_LOGITS, HIDDEN = MBLMReturnType.LOSS_LOGITS, MBLMReturnType.HIDDEN_STATE
DECODER = model(mamba("mamba1"), transformer(), transformer(), seq_lens=[3, 2, 4])
LOCAL = model(transformer(), seq_lens=[16])
ENCODER = encoder(seq_lens=[3, 4])
MASKS = {"attention_mask": torch.arange(24).view(2, 12) % 5 > 0, "loss_mask": torch.rand(2, 12)}


def draw_ids(*shape: int) -> Tensor:
    return torch.arange(2 * 3 * 2 * 4)[: torch.Size(shape).numel()].view(shape) * 7 % 17


def decoded(fed: Callable[[Any], Any], batch: int = 2) -> Callable[[Tensor], Any]:
    return lambda ids: DECODER.session(batch).feed(fed(ids)).logits().clone()


# What is called, and the tensors it is called with.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "flat ids": (lambda ids: DECODER(ids, return_type=LOSS_LOGITS), (draw_ids(2, 13),)),
    "whole patches": (lambda ids: DECODER(ids, return_type=LOSS_LOGITS), (draw_ids(2, 16),)),
    "nested ids": (lambda ids: DECODER(ids, return_type=LOSS_LOGITS), (draw_ids(2, 3, 2, 4),)),
    "hidden states": (lambda ids: DECODER(ids, return_type=HIDDEN), (draw_ids(2, 16),)),
    "loss_mask": (lambda i, m: DECODER(i, loss_mask=m), (draw_ids(2, 24), torch.rand(2, 24))),
    "one stage": (lambda ids: LOCAL(ids, return_type=LOSS_LOGITS), (draw_ids(2, 16),)),
    "inputs_embeds": (
        lambda *e: DECODER(inputs_embeds=e, return_type=HIDDEN),
        (torch.randn(2, 3, 2, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 8)),
    ),
    "encoder's ids": (lambda ids: ENCODER(ids, labels=ids), (draw_ids(2, 12),)),
    "encoder's nested ids": (lambda ids: ENCODER(ids, labels=ids), (draw_ids(2, 3, 4),)),
    "encoder's labels and masks": (
        lambda ids, labels, a, w: ENCODER(ids, labels=labels, attention_mask=a, loss_mask=w),
        (draw_ids(2, 12), draw_ids(2, 12).flip(1), *MASKS.values()),
    ),
    "encoder's inputs_embeds": (
        lambda *e: ENCODER(inputs_embeds=e[:2], attention_mask=e[2], return_type=HIDDEN),
        (torch.randn(2, 3, 4, 8), torch.randn(2, 3, 8), MASKS["attention_mask"].view(2, 3, 4)),
    ),
    "prime": (
        lambda ids: DECODER.generate(ids, num_tokens_to_generate=2, seed=1, enable_progress=False),
        (draw_ids(9),),
    ),
    "fed rows": (decoded(lambda ids: ids), (draw_ids(2, 9),)),
    "a fed row": (decoded(lambda ids: ids, batch=1), (draw_ids(9),)),
    "a list of fed rows": (decoded(lambda ids: [ids[0], ids[1, :5]]), (draw_ids(2, 9),)),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "rows apart": lambda t: t.repeat_interleave(3, 0)[1::3],
    "one row repeated": lambda t: t[:1].expand_as(t),
    "one value repeated": lambda t: t.flatten()[0].expand_as(t),
    "within another": lambda t: torch.stack([t, t, t])[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_strides_make_no_difference(call: str, layout: str, gradients: bool) -> None:
    function, inputs = CALLS[call]
    strided = [LAYOUTS[layout](tensor) for tensor in inputs]
    with torch.set_grad_enabled(gradients):
        actual, expected = function(*strided), function(*(t.contiguous() for t in strided))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", [getattr(torch, sign + w) for sign in ("int", "uint") for w in ("8", "16", "32", "64")]
)
@pytest.mark.parametrize("call", CALLS)
def test_ids_may_be_of_every_integer_type(call: str, dtype: torch.dtype) -> None:
    function, inputs = CALLS[call]
    given = [t if t.is_floating_point() or t.dtype == torch.bool else t.to(dtype) for t in inputs]
    torch.testing.assert_close(function(*given), function(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "dtype"), [(19, torch.uint16), (2**32 - 1, torch.uint32), (2**64 - 1, torch.uint64)]
)
def test_an_unsigned_id_outside_the_vocabulary_is_named(value: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"token id {value} at position \(0, 1\)"):
        DECODER(torch.tensor([[1, value]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.bool])
def test_a_loss_mask_may_be_of_any_type(dtype: torch.dtype) -> None:
    ids, mask = draw_ids(2, 13), (torch.arange(26).view(2, 13) % 3 > 0).to(dtype)
    torch.testing.assert_close(DECODER(ids, loss_mask=mask), DECODER(ids, loss_mask=mask.float()))
    with pytest.raises(TypeError, match=r"loss_mask: expected real numbers, got torch\.complex64"):
        DECODER(ids, loss_mask=mask.cfloat())


@pytest.mark.parametrize("m", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_a_sum_of_losses_may_exceed_half_precision(m: torch.nn.Module) -> None:
    """The loss is a mean, whose sum is made in float32."""
    ids = draw_ids(1, 12).expand(2000, -1)
    half = copy.deepcopy(m).half()
    with torch.no_grad():
        half.to_logits.weight.mul_(0.1)
    loss = half(ids, **({"labels": ids} if m is ENCODER else {}), return_type=MBLMReturnType.LOSS)
    assert loss.dtype == torch.float16
    assert 24_000 * loss.item() > 65_504 and loss.isfinite()
