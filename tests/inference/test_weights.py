"""Packed weights: made once for all caches, and anew when the model is no longer what it was."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mblm import MBLM
from mblm.inference.weights import Weights, weights_of
from mblm.ops.packing import WEIGHT_TYPES
from tests import fresh
from tests.models import LSTMBlock, mamba, model, transformer
from tests.native import needs_native

pytestmark = needs_native

BLOCKS: dict[str, Callable[[], Any]] = {
    "transformer": lambda: transformer(pos_emb_type="rope"),
    "mamba1": lambda: mamba("mamba1"),
    "mamba2": lambda: mamba("mamba2"),
}


def two_stages(upper: Any = None, local: Any = None) -> MBLM:
    return model(upper or BLOCKS["transformer"](), local or transformer(), seq_lens=[5, 3])


def packed(of: MBLM, weights: str = "float32") -> Weights:
    found = weights_of(of, weights)
    assert found is not None and found.holds()
    return found


def hosted(of: MBLM) -> list[int]:
    return sorted(packed(of).hosted)


def no_hook(*_: object) -> None:
    pass


class TestPackedOnce:
    @pytest.mark.parametrize("weights", WEIGHT_TYPES)
    @pytest.mark.parametrize("upper", BLOCKS)
    @pytest.mark.parametrize("local", BLOCKS)
    def test_for_all_caches_of_a_model_and_type(self, upper: str, local: str, weights: str) -> None:
        own = two_stages(BLOCKS[upper](), BLOCKS[local]())
        first = packed(own, weights)
        assert packed(own, weights) is first and not first.hosted
        assert first.hierarchy.num_tokens == own.num_tokens

    def test_each_type_by_itself(self) -> None:
        own = two_stages()
        assert len({id(packed(own, weights)) for weights in WEIGHT_TYPES}) == 3

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_whatever_the_number_of_stages(self, count: int) -> None:
        own = model(transformer(), seq_lens=[4] * count)
        assert packed(own).hierarchy.max_length == 4**count

    def test_two_threads_share_what_the_first_packs(self) -> None:
        own, found = two_stages(), []
        threads = [
            threading.Thread(target=lambda: found.append(weights_of(own, "int8"))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] is found[1] is not None

    def test_generating_and_feeding_change_nothing(self) -> None:
        own = two_stages()
        first = packed(own)
        own.generate(torch.randint(0, 18, (10,)), num_tokens_to_generate=4)
        assert packed(own) is first

    @pytest.mark.parametrize("block", BLOCKS)
    def test_whatever_the_default_dtype(self, block: str) -> None:
        own = two_stages(BLOCKS[block](), BLOCKS[block]())
        torch.set_default_dtype(torch.float64)
        try:
            assert not packed(own, "int8").hosted
            assert own.session().feed(b"\1\2\3\4").generate(5).shape == (1, 5)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_an_unknown_type_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"weights: expected one of float32, .*, got 'int4'"):
            weights_of(two_stages(), "int4")


def replace_parameter(own: Any) -> None:
    own.to_logits.weight = nn.Parameter(own.to_logits.weight.detach().clone())


def give_other_data(own: Any) -> None:
    own.stage_models[1].norm.g.data = own.stage_models[1].norm.g.detach().clone()


def write_in_place(own: Any) -> None:
    with torch.no_grad():
        own.stage_models[0].layers[0][0].to_q.weight.mul_(2)


def transpose(own: Any) -> None:
    weight = own.stage_models[0].layers[0][0].to_q.weight
    weight.data = weight.data.t()


def swap(own: Any) -> None:
    weight = own.to_logits.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


def give_memory_away(own: Any) -> None:
    own.to_logits.weight.untyped_storage().resize_(0)


def replace_layer(own: Any) -> None:
    own.stage_models[0].layers[0][1] = copy.deepcopy(own.stage_models[0].layers[0][1])


def replace_stage(own: Any) -> None:
    own.stage_models[1] = copy.deepcopy(own.stage_models[1])


def scale_frequencies(own: Any) -> None:
    rotary = own.stage_models[0].rotary_emb
    rotary.inv_freq = rotary.inv_freq / 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "moved to shared memory": lambda own: own.share_memory(),
    "a replaced parameter": replace_parameter,
    "other data": give_other_data,
    "a write in place": write_in_place,
    "other strides": transpose,
    "swapped tensors": swap,
    "memory given away": give_memory_away,
    "a replaced layer": replace_layer,
    "a replaced stage": replace_stage,
    "other frequencies": scale_frequencies,
    "a start token": lambda own: own.start_tokens[0].add_(1),
    "loaded": lambda own: own.load_state_dict(own.state_dict()),
    "to double and back": lambda own: own.double().float(),
}


class TestChanged:
    @pytest.mark.parametrize("how", CHANGES)
    @pytest.mark.parametrize("weights", ["float32", "int8"])
    def test_weights_are_packed_anew(self, how: str, weights: str) -> None:
        own = two_stages()
        first = packed(own, weights)
        with torch.no_grad():
            CHANGES[how](own)
        gc.collect()
        assert not first.holds()
        if how != "memory given away":
            assert packed(own, weights) is not first

    def test_no_other_memory_comes_to_lie_where_theirs_was(self) -> None:
        own: Any = two_stages()
        first, weight = packed(own, "int8"), own.to_logits.weight
        for _ in range(50):
            weight.data = torch.zeros_like(weight.data)
            assert not first.holds()

    def test_so_are_those_of_a_stage_that_is_hosted(self) -> None:
        own: Any = two_stages(LSTMBlock())
        first = packed(own)
        with torch.no_grad():
            own.stage_models[0].lstm.bias_ih_l0.add_(1)
        second = packed(own)
        assert not first.holds() and second.holds()
        outputs = [found.hosted[0].start_output for found in (first, second)]
        assert not torch.equal(*outputs)

    def test_a_model_made_in_inference_mode_has_no_count_of_writes(self) -> None:
        with torch.inference_mode():
            own: Any = two_stages()
            first = packed(own)
            own.to_logits.weight.add_(1)
            assert packed(own) is first
            own.to_logits.weight = nn.Parameter(own.to_logits.weight + 1)
            assert not first.holds()


LATE: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda stage: stage.register_forward_hook(no_hook),
    "a hook of a layer": lambda stage: stage.layers[0][0].to_q.register_forward_pre_hook(no_hook),
    "another forward": lambda stage: setattr(stage.norm, "forward", lambda x: x),
    "a subclass": lambda stage: setattr(
        stage.norm, "__class__", type("Sub", (type(stage.norm),), {})
    ),
    "a parametrization": lambda stage: nn.utils.parametrize.register_parametrization(
        stage.layers[0][0].to_q, "weight", nn.Identity()
    ),
    "a transposed weight": lambda stage: setattr(
        stage.layers[0][0].to_kv, "weight", nn.Parameter(torch.randn(8, 16).t())
    ),
    "an adapter": lambda stage: setattr(
        stage.layers[0][0], "to_q", nn.Sequential(stage.layers[0][0].to_q)
    ),
}


class TestNoLongerPlain:
    @pytest.mark.parametrize("how", LATE)
    def test_an_upper_stage_is_hosted(self, how: str) -> None:
        own: Any = two_stages()
        first = packed(own)
        LATE[how](own.stage_models[0])
        assert not first.holds() and hosted(own) == [0]

    @pytest.mark.parametrize("how", LATE)
    def test_with_the_local_stage_there_is_no_native_cache(self, how: str) -> None:
        own: Any = two_stages()
        first = packed(own)
        LATE[how](own.stage_models[1])
        assert not first.holds() and weights_of(own) is None

    @pytest.mark.parametrize("name", ["to_logits", "token_embs_rev.0.embedding", "pos_embs.1"])
    def test_nor_with_what_is_around_it(self, name: str) -> None:
        own: Any = two_stages()
        first = packed(own)
        own.get_submodule(name).register_forward_hook(no_hook)
        assert not first.holds() and weights_of(own) is None

    @pytest.mark.parametrize("name", ["to_next_stage_proj.0.1", "token_embs_rev.1", "pos_embs.0"])
    def test_what_is_beside_an_upper_stage_makes_it_hosted(self, name: str) -> None:
        own: Any = two_stages()
        packed(own)
        own.get_submodule(name).register_forward_hook(no_hook)
        assert hosted(own) == [0]

    def test_a_hook_for_all_modules_leaves_none_native(self) -> None:
        own = two_stages()
        first = packed(own)
        handle = register_module_forward_hook(no_hook)
        try:
            assert not first.holds() and weights_of(own) is None
        finally:
            handle.remove()
        assert hosted(own) == []

    def test_another_forward_of_a_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = two_stages()
        first = packed(own)
        forward = nn.LayerNorm.forward
        monkeypatch.setattr(nn.LayerNorm, "forward", lambda *a: forward(*a))
        assert not first.holds() and hosted(own) == [0]

    def test_a_hook_that_is_gone_leaves_the_stage_native(self) -> None:
        own: Any = two_stages()
        handle = own.stage_models[0].register_forward_hook(no_hook)
        assert hosted(own) == [0]
        handle.remove()
        assert hosted(own) == []

    @pytest.mark.parametrize("stage", [0, 1])
    def test_dropout_counts_in_training(self, stage: int) -> None:
        blocks = [transformer(), transformer()]
        blocks[stage] = transformer(attn_dropout=0.1)
        own = model(*blocks, seq_lens=[5, 3])
        first = packed(own)
        own.train()
        again = weights_of(own)
        assert again is None if stage else again is not None and list(again.hosted) == [0]
        assert weights_of(own) is again
        own.eval()
        assert not packed(own).hosted and not packed(own).refused
        assert first is not again

    def test_a_model_in_training_without_dropout_is_native(self) -> None:
        assert hosted(two_stages().train()) == []


class TestNeverPlain:
    def test_a_users_upper_stage_is_hosted(self) -> None:
        own = model(transformer(), LSTMBlock(), transformer(), seq_lens=[5, 4, 3])
        assert hosted(own) == [1]

    def test_a_users_local_stage_has_no_native_cache(self) -> None:
        assert weights_of(two_stages(local=LSTMBlock())) is None

    def test_nor_has_a_model_of_another_dtype(self) -> None:
        own = two_stages()
        packed(own)
        assert weights_of(own.to(torch.bfloat16)) is None
        assert weights_of(own.double()) is None

    @pytest.mark.filterwarnings("ignore")
    def test_nor_one_with_quantized_layers(self) -> None:
        own = two_stages()
        quantized = torch.ao.quantization.quantize_dynamic(own, {nn.Linear})
        assert weights_of(quantized) is None and hosted(own) == []

    def test_a_stage_that_cannot_be_packed_is_hosted(self) -> None:
        own: Any = two_stages(mamba("mamba2"))
        own.stage_models[0].layers[0].norm.eps = 1e-3
        first = packed(own)
        assert first.refused == {0} and packed(own) is first

    def test_without_kernels_there_is_none(self) -> None:
        code = (
            "from mblm.inference.weights import weights_of\n"
            "from tests.models import model, transformer\n"
            "assert weights_of(model(transformer(), seq_lens=[3])) is None"
        )
        fresh.output_of(code, MBLM_NATIVE="0")


class TestLifetime:
    def test_packed_weights_go_with_the_model(self) -> None:
        own = two_stages()
        found, refs = packed(own), [weakref.ref(own), weakref.ref(packed(own))]
        del own, found
        assert [ref() for ref in refs] == [None, None]

    def test_also_where_a_hook_knows_the_model(self) -> None:
        def knowing(own: Any) -> list[Any]:
            own.stage_models[0].register_forward_hook(lambda *_: no_hook(own))
            return [weakref.ref(own), weakref.ref(packed(own))]

        refs = knowing(two_stages(LSTMBlock()))
        gc.collect()
        assert [ref() for ref in refs] == [None, None]

    def test_a_module_that_is_gone_is_no_danger(self) -> None:
        own: Any = two_stages()
        first = packed(own)
        own.stage_models[1] = transformer().to_model(8, 1)
        del own.to_logits
        gc.collect()
        assert not first.holds()
        del own
        gc.collect()
        assert not first.holds()

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, copy.copy, lambda own: pickle.loads(pickle.dumps(own))]
    )
    def test_copies_pack_for_themselves(self, copied: Callable[[MBLM], MBLM]) -> None:
        own = two_stages()
        first = packed(own, "int8")
        other = copied(own)
        assert packed(other, "int8") is not first and packed(own, "int8") is first


@pytest.mark.skipif(sys.platform != "linux", reason="a limit to addresses")
def test_int8_under_a_limit_to_addresses() -> None:
    code = """
import resource
import torch
from mblm.inference.weights import weights_of
from tests.models import model, transformer

own = model(transformer(), seq_lens=[3], hidden_dims=[512])  # half a megabyte of weights a layer
weights_of(own)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (24 << 20)  # less than is mapped at once
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
assert weights_of(own, "int8") is not None
"""
    fresh.output_of(code)
