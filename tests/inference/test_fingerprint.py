"""Fingerprints: what tells models apart, and how seldom weights are hashed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mblm import MBLM
from mblm.inference import fingerprint as module
from mblm.inference.fingerprint import fingerprint
from mblm.model.block import StageBlock
from tests.models import mamba, model, transformer


@pytest.fixture
def m() -> MBLM:
    return model(transformer(), mamba(), seq_lens=[6, 4])


def write(position: int) -> Callable[[MBLM], Any]:
    def change(m: MBLM) -> None:
        with torch.no_grad():
            m.to_logits.weight.view(-1)[position] += 1e-3

    return change


def replace(m: MBLM) -> None:
    m.to_logits.bias = nn.Parameter(m.to_logits.bias.detach() + 1)


def swap_layers(m: MBLM) -> None:
    stage = m.stage_models[0]
    stage.layers = stage.layers[::-1]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(write(0), id="the first value"),
        pytest.param(write(-1), id="the last value"),
        pytest.param(replace, id="another parameter"),
        pytest.param(lambda m: m.double(), id="dtype"),
        pytest.param(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3).step(), id="a step"),
        pytest.param(swap_layers, id="order of layers"),
    ],
)
def test_every_change_of_weights_is_seen(change: Callable[[MBLM], Any]) -> None:
    m = model(transformer(), mamba(), seq_lens=[6, 4], num_layers=[2, 1])
    m(torch.arange(9)[None]).backward()
    before = fingerprint(m)
    change(m)
    assert fingerprint(m) != before


@pytest.mark.parametrize(
    ("block", "others"),
    [
        (transformer(pos_emb_type=None), {"pos_emb_type": "rope"}),
        (transformer(attn_use_rot_embs=False), {"attn_head_dims": 2, "attn_num_heads": 4}),
        (transformer(), {"attn_use_rot_embs": False}),
    ],
    ids=["rope", "heads", "rotary positions"],
)
def test_the_same_weights_used_otherwise_are_another_model(
    block: StageBlock, others: dict[str, Any]
) -> None:
    first = model(block, seq_lens=[6])
    second = model(block.model_copy(update=others), seq_lens=[6])
    second.load_state_dict(first.state_dict(), strict=False)
    assert fingerprint(first) != fingerprint(second)


def test_what_changes_no_number_is_no_other_model(m: MBLM) -> None:
    expected = fingerprint(m)
    fields = {"train_checkpoint_chunks": [2], "tile": 8, "checkpoint_global": True}
    other = model(transformer(), mamba(), seq_lens=[6, 4], **fields)
    other.load_state_dict(m.state_dict())
    assert fingerprint(other) == expected
    # Another processor computes other last bits.
    rotary = other.stage_models[0].rotary_emb
    rotary.inv_freq = rotary.inv_freq.nextafter(torch.tensor(2.0))
    assert fingerprint(other) == expected
    other.stage_models[0] = torch.compile(other.stage_models[0])
    assert fingerprint(other) == expected
    assert fingerprint(copy.deepcopy(m)) == expected


def test_one_block_for_all_stages_is_a_block_for_each() -> None:
    one, each = (model(*blocks, seq_lens=[6, 4]) for blocks in ([mamba()], [mamba(), mamba()]))
    each.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(each)


def test_weights_are_hashed_once_for_each_version(m: MBLM, monkeypatch: Any) -> None:
    calls: list[int] = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda *state: (calls.append(1), digest(*state))[1])
    first = fingerprint(m)
    assert fingerprint(m) == first and len(calls) == 1
    write(5)(m)
    assert fingerprint(m) != first and len(calls) == 2
    m.load_state_dict(m.state_dict())
    fingerprint(m)
    assert len(calls) == 3


def test_weights_whose_changes_leave_no_trace_are_hashed_anew() -> None:
    with torch.inference_mode():
        m = model(transformer(), seq_lens=[6])
        first = fingerprint(m)
        m.to_logits.weight[0, 0] += 1
        assert fingerprint(m) != first


def test_quantized_layers_count(m: MBLM) -> None:
    quantized = copy.deepcopy(m)
    quantized.to_logits = torch.ao.nn.quantized.dynamic.Linear.from_float(
        _with_qconfig(quantized.to_logits)
    )
    first = fingerprint(quantized)
    assert fingerprint(quantized) == first != fingerprint(m)
    weight, bias = quantized.to_logits._weight_bias()
    quantized.to_logits.set_weight_bias(weight, bias + 1)
    assert fingerprint(quantized) != first


def _with_qconfig(linear: nn.Module) -> nn.Module:
    plain = nn.Linear(8, 19)
    plain.load_state_dict(linear.state_dict())
    plain.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return plain
