"""A model and its tokenizer as Hugging Face's library builds, saves, runs and publishes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")

from mblm import MBLM, MBLMReturnType  # noqa: E402
from mblm.hf import MBLMConfig, MBLMForCausalLM, MBLMTokenizer  # noqa: E402
from tests.models import LSTMBlock, encoder, mamba, model, transformer  # noqa: E402

BLOCKS: dict[str, Callable[[], Any]] = {
    "transformer": transformer,
    "transformer, rope": lambda: transformer(pos_emb_type="rope"),
    "mamba1": lambda: mamba("mamba1", pos_emb_type="rope"),
    "mamba2": lambda: mamba("mamba2"),
}


def build(kind: str = "transformer", **fields: Any) -> MBLM:
    torch.manual_seed(0)
    sizes = {"seq_lens": [30, 4], "num_tokens": 257, "hidden_dims": [16, 8], **fields}
    return model(BLOCKS[kind](), **sizes)


@pytest.fixture
def m() -> MBLM:
    return build()


@pytest.fixture
def lm(m: MBLM) -> MBLMForCausalLM:
    return MBLMForCausalLM.from_mblm(m)


@pytest.fixture
def tokenizer() -> MBLMTokenizer:
    return MBLMTokenizer()


def ids_of(*texts: bytes) -> Tensor:
    return torch.tensor([list(text) for text in texts])


def logits_of(m: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return m(ids).logits if isinstance(m, MBLMForCausalLM) else m(ids, return_type=LOGITS)


LOGITS = MBLMReturnType.LOGITS
IDS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(1))


class TestConfig:
    def test_is_that_of_the_model(self, m: MBLM) -> None:
        config = MBLMConfig.of(m.config)
        assert config.mblm_config() == m.config
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 8, 2)
        assert json.loads(config.to_json_string())["block"] == m.config.block.model_dump()

    def test_is_found_by_its_type(self, m: MBLM) -> None:
        config = transformers.AutoConfig.for_model("MBLM", **m.config.model_dump(mode="json"))
        assert type(config) is MBLMConfig and config.mblm_config() == m.config
        built = transformers.AutoModelForCausalLM.from_config(config)
        assert type(built) is MBLMForCausalLM and built.model.config == m.config

    def test_of_no_model_is_refused(self, m: MBLM) -> None:
        fields = m.config.model_dump(mode="json")
        with pytest.raises(ValueError, match="num_layers has 3 entries"):
            MBLMConfig(**{**fields, "num_layers": [1, 1, 1]})

    def test_has_a_seed_mean_the_same_weights(self, m: MBLM) -> None:
        config = MBLMConfig.of(m.config)
        torch.manual_seed(0)
        built = MBLMForCausalLM(config).model
        assert all(torch.equal(built.state_dict()[n], w) for n, w in m.state_dict().items())


class TestFolders:
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_are_read_by_either_library(self, tmp_path: Path, kind: str, dtype: Any) -> None:
        m = build(kind).to(dtype)
        MBLMForCausalLM.from_mblm(m).save_pretrained(tmp_path / "theirs")
        m.save_pretrained(tmp_path / "ours")
        for folder in ("theirs", "ours"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, dtype=dtype
            )
            ours = MBLM.from_pretrained(tmp_path / folder)
            assert type(theirs) is MBLMForCausalLM and not theirs.training
            assert theirs.dtype == ours.dtype == dtype
            for loaded in (theirs, ours):
                assert torch.equal(logits_of(loaded, IDS), logits_of(m, IDS))

    def test_keep_what_is_known_of_the_model(self, tmp_path: Path, m: MBLM) -> None:
        MBLMForCausalLM.from_mblm(m, bits_per_byte=1.5).save_pretrained(tmp_path)
        assert MBLMForCausalLM.from_pretrained(tmp_path).config.bits_per_byte == 1.5
        assert MBLM.from_pretrained(tmp_path).config == m.config

    def test_without_a_weight_are_refused(self, tmp_path: Path, m: MBLM) -> None:
        other = build(hidden_dims=[16, 10])
        m.save_pretrained(tmp_path)
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
        with pytest.raises((ValueError, RuntimeError), match=r"ismatch|no weights that fit"):
            MBLMForCausalLM.from_pretrained(tmp_path)
        weights = {n: w for n, w in other.state_dict().items() if n != "to_logits.bias"}
        with pytest.raises(ValueError, match=r"no weights that fit .*to_logits\.bias"):
            config = MBLMConfig.of(other.config)
            MBLMForCausalLM.from_pretrained(None, config=config, state_dict=weights)

    def test_of_a_block_of_the_users_own(self, tmp_path: Path) -> None:
        m = model(LSTMBlock(), seq_lens=[3, 4], num_tokens=257)
        with pytest.raises(ValueError, match="block"):
            MBLMForCausalLM.from_mblm(m)


class TestWrapping:
    def test_shares_the_weights_and_the_mode(self, m: MBLM) -> None:
        for mode in (True, False):
            lm = MBLMForCausalLM.from_mblm(m.train(mode))
            assert lm.model is m and lm.training == mode
            assert lm.num_parameters() == sum(p.numel() for p in m.parameters())

    def test_of_anything_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"expected an mblm\.MBLM, got MBLMEncoder"):
            MBLMForCausalLM.from_mblm(encoder(seq_lens=[3, 4]))

    def test_has_the_parts_that_the_library_asks_for(self, lm: MBLMForCausalLM) -> None:
        assert lm.get_input_embeddings().weight.shape == (257, 8)
        assert lm.get_output_embeddings() is lm.model.to_logits
        with pytest.raises(NotImplementedError, match="vocabulary"):
            lm.resize_token_embeddings(300)


class TestForward:
    def test_gives_the_models_logits(self, lm: MBLMForCausalLM, m: MBLM) -> None:
        output = lm(IDS)
        assert output.loss is None and torch.equal(output.logits, m(IDS, return_type=LOGITS))
        assert torch.equal(lm(IDS, return_dict=False)[0], output.logits)

    def test_predicts_the_label_of_the_next_byte(self, lm: MBLMForCausalLM) -> None:
        labels = IDS.clone()
        labels[:, :4] = labels[1, 7] = -100
        output = lm(IDS, labels=labels)
        log_probs = output.logits.log_softmax(-1)
        terms = [
            -log_probs[b, i - 1, IDS[b, i]]
            for b in range(2)
            for i in range(1, 13)
            if labels[b, i] != -100
        ]
        torch.testing.assert_close(output.loss, torch.stack(terms).mean())
        summed = lm(IDS, labels=labels, num_items_in_batch=torch.tensor(5)).loss
        torch.testing.assert_close(summed, torch.stack(terms).sum() / 5)

    def test_without_labels_that_count_has_a_loss_of_0(self, lm: MBLMForCausalLM) -> None:
        loss = lm(IDS, labels=torch.full_like(IDS, -100)).loss
        loss.backward()
        assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in lm.parameters())

    def test_at_either_end_padding_changes_nothing(self, lm: MBLMForCausalLM) -> None:
        texts = [b"some text", b"more"]
        for side in ("left", "right"):
            tokenizer = MBLMTokenizer(padding_side=side)
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            output = lm(**batch, labels=labels)
            losses = []
            for row, text in enumerate(texts):
                alone = lm(ids_of(text), labels=ids_of(text))
                own = output.logits[row][batch["attention_mask"][row] == 1]
                torch.testing.assert_close(own, alone.logits[0])
                losses.append(alone.loss * (len(text) - 1))
            torch.testing.assert_close(output.loss, sum(losses) / 11)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"attention_mask": torch.ones(2, 12)}, ValueError, "shape of input_ids"),
            ({"attention_mask": torch.tensor([[1, 0, 1] * 4 + [1]] * 2)}, ValueError, "gaps"),
            ({"labels": IDS[:, 1:]}, ValueError, "labels: expected the shape"),
            ({"labels": IDS + 100}, ValueError, "labels"),
            ({"inputs_embeds": torch.ones(1)}, TypeError, "inputs_embeds: not known"),
        ],
    )
    def test_bad_input_is_named(
        self, lm: MBLMForCausalLM, arguments: dict[str, Any], error: Any, words: str
    ) -> None:
        with pytest.raises(error, match=words):
            lm(IDS, **arguments)

    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    def test_with_activations_computed_again_has_the_same_gradients(self, kind: str) -> None:
        lm = MBLMForCausalLM.from_mblm(build(kind).train())
        ids = IDS.repeat(1, 5)
        gradients = []
        for enable in (False, True, False):
            if enable:
                lm.activation_checkpointing_enable()
                lm.model.config = lm.model.config.model_copy(update={"tile": 16})
            else:
                lm.activation_checkpointing_disable()
            assert lm.is_activation_checkpointing == enable == lm.model.config.checkpoint_global
            lm.zero_grad()
            lm(ids, labels=ids).loss.backward()
            gradients.append([p.grad.clone() for p in lm.parameters()])
        for one, other, third in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            assert torch.equal(one, third)
