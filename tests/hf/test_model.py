"""A model and its tokenizer as Hugging Face's library builds, saves, runs and publishes them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")

from mblm import MBLM  # noqa: E402
from mblm.hf import MBLMConfig, MBLMForCausalLM, MBLMTokenizer  # noqa: E402
from tests.hf.models import BLOCKS, IDS, LOGITS, build, ids_of, logits_of  # noqa: E402
from tests.models import LSTMBlock, encoder, model  # noqa: E402


class TestConfig:
    def test_is_that_of_the_model(self, m: MBLM) -> None:
        config = MBLMConfig.of(m.config)
        assert config.mblm_config() == m.config
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 8, 2)
        assert config.max_position_embeddings == MBLMTokenizer.of(config).model_max_length == 120
        unlimited = MBLMConfig.of(build("mamba2").config)
        assert unlimited.max_position_embeddings is None
        assert MBLMTokenizer.of(unlimited).model_max_length > 10**9
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


class TestFolders:
    @pytest.mark.parametrize("kind", sorted(BLOCKS))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_are_read_by_either_library(self, tmp_path: Path, kind: str, dtype: Any) -> None:
        m = build(kind).to(dtype)
        MBLMForCausalLM.from_mblm(m).save_pretrained(tmp_path / "theirs")
        m.save_pretrained(tmp_path / "ours")
        for folder in ("theirs", "ours"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, dtype=dtype, attn_implementation="sdpa"
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

    def test_hold_tied_weights_under_all_names(self, tmp_path: Path) -> None:
        m = build()
        m.to_logits.weight = m.token_embs_rev[0].embedding.weight
        MBLMForCausalLM.from_mblm(m).save_pretrained(tmp_path)
        for loaded in (MBLMForCausalLM.from_pretrained(tmp_path), MBLM.from_pretrained(tmp_path)):
            assert torch.equal(logits_of(loaded, IDS), logits_of(m, IDS))

    def test_in_several_parts_are_loaded(self, tmp_path: Path, lm: MBLMForCausalLM) -> None:
        lm.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = MBLMForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        assert torch.equal(logits_of(loaded, IDS), logits_of(lm, IDS))
        assert torch.equal(logits_of(MBLM.from_pretrained(tmp_path), IDS), logits_of(lm, IDS))

    @pytest.mark.parametrize(
        "options",
        [{"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 1000}}],
        ids=["disk", "no room"],
    )
    def test_that_no_device_holds_are_refused(self, tmp_path: Path, m: MBLM, options: Any) -> None:
        pytest.importorskip("accelerate")
        m.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"device_map: a model is on one device.*disk"):
            MBLMForCausalLM.from_pretrained(tmp_path, offload_folder=tmp_path / "parts", **options)

    def test_hold_the_last_save_alone(self, tmp_path: Path) -> None:
        """In one file, in several and in one again, of either library."""
        for number, size in enumerate((None, "5KB", "50GB", "5KB", None, "5KB")):
            m = build()
            m.to_logits.bias.data[0] = number
            if size is None:
                m.save_pretrained(tmp_path)
            else:
                MBLMForCausalLM.from_mblm(m).save_pretrained(tmp_path, max_shard_size=size)
            for face in (MBLM, MBLMForCausalLM):
                loaded = face.from_pretrained(tmp_path)
                assert torch.equal(logits_of(loaded, IDS), logits_of(m, IDS)), (number, face)

    def test_of_a_block_of_the_users_own(self, tmp_path: Path) -> None:
        m = model(LSTMBlock(), seq_lens=[3, 4], num_tokens=257)
        with pytest.raises(ValueError, match="block"):
            MBLMForCausalLM.from_mblm(m)


class TestWrapping:
    def test_shares_the_weights_and_the_mode(self, m: MBLM) -> None:
        before = [p.clone() for p in m.parameters()]
        for mode in (True, False):
            lm = MBLMForCausalLM.from_mblm(m.train(mode))
            assert lm.model is m and lm.training == mode
            assert all(map(torch.equal, before, lm.parameters()))
            assert lm.num_parameters() == sum(p.numel() for p in m.parameters())

    def test_of_anything_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"expected an mblm\.MBLM, got MBLMEncoder"):
            MBLMForCausalLM.from_mblm(encoder(seq_lens=[3, 4]))

    def test_without_values_is_filled_later(self, lm: MBLMForCausalLM) -> None:
        with torch.device("meta"):
            empty = MBLMForCausalLM(lm.config).eval()
        empty.to_empty(device="cpu").load_state_dict(lm.state_dict())
        assert torch.equal(logits_of(empty, IDS), logits_of(lm, IDS))

    def test_has_the_parts_that_the_library_asks_for(self, lm: MBLMForCausalLM) -> None:
        assert lm.get_input_embeddings().weight.shape == (257, 8)
        assert lm.get_output_embeddings() is lm.model.to_logits
        with pytest.raises(NotImplementedError, match="vocabulary"):
            lm.resize_token_embeddings(300)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the hub was told; its repository has no card."""
        from huggingface_hub import HfApi

        told: dict[str, Any] = {"has_card": False}

        def create_repo(api: HfApi, repo_id: str, **options: Any) -> Any:
            told["repository"] = options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> str:
            told["files"] = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
            told["commit"] = options
            return f"https://hub/{repo_id}/commit/1"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(HfApi, "create_branch", lambda *_, **options: told.update(options))
        monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: told["has_card"])
        return told

    @pytest.mark.parametrize("face", ["mblm", "transformers"])
    def test_gets_a_folder_that_loads_and_a_card(
        self, hub: dict[str, Any], m: MBLM, face: str, tmp_path: Path
    ) -> None:
        pushed = m if face == "mblm" else MBLMForCausalLM.from_mblm(m, bits_per_byte=1.25)
        known = {"bits_per_byte": 1.25} if face == "mblm" else {}
        commit = pushed.push_to_hub("me/small", private=True, revision="v1", **known)
        assert commit == "https://hub/me/small/commit/1"
        assert hub["repository"] == {"private": True, "exist_ok": True}
        assert hub["branch"] == hub["commit"]["revision"] == "v1"
        for name, content in hub["files"].items():
            (tmp_path / name).write_bytes(content)
        assert torch.equal(logits_of(MBLM.from_pretrained(tmp_path), IDS), logits_of(m, IDS))

        from huggingface_hub import ModelCard

        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == face and card.data.pipeline_tag == "text-generation"
        assert "**1.25 bits per byte**" in card.text
        assert "| 2 | transformer | 4 | 8 | 1 |" in card.text
        code = card.text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert '"me/small"' in code

    def test_keeps_a_card_that_is_there(self, hub: dict[str, Any], lm: MBLMForCausalLM) -> None:
        hub["has_card"] = True
        lm.push_to_hub("me/small")
        assert "README.md" not in hub["files"] and "model.safetensors" in hub["files"]

    def test_adds_to_a_pull_request(self, hub: dict[str, Any], m: MBLM) -> None:
        m.push_to_hub("me/small", revision="refs/pr/7")
        assert "branch" not in hub and hub["commit"]["revision"] == "refs/pr/7"

    def test_is_not_told_what_is_no_number(self, hub: dict[str, Any], m: MBLM) -> None:
        for bits in (-1, 0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="bits_per_byte"):
                m.push_to_hub("me/small", bits_per_byte=bits)
        assert "repository" not in hub


class TestPipeline:
    def test_writes_text(self, lm: MBLMForCausalLM, m: MBLM, tmp_path: Path) -> None:
        lm.save_pretrained(tmp_path)
        MBLMTokenizer.of(lm.config).save_pretrained(tmp_path)
        pipe = transformers.pipeline("text-generation", model=str(tmp_path))
        texts = ["some é text", "more"]
        answers = pipe(texts, do_sample=False, max_new_tokens=8, batch_size=2)
        for text, (answer,) in zip(texts, answers, strict=True):
            data = m.generate(text, num_tokens_to_generate=8, enable_progress=False)
            expected = bytes(i for i in data.tolist() if i < 256).decode(errors="replace")
            assert answer["generated_text"] == expected
        assert pipe("", max_new_tokens=2, return_full_text=False)[0]["generated_text"]


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
            ({"labels": IDS.tolist()}, TypeError, "labels: expected a tensor of token ids"),
            ({"labels": IDS.float()}, TypeError, "labels: expected integer token ids"),
            ({"inputs_embeds": torch.ones(1)}, TypeError, "inputs_embeds: not known"),
            ({"position_ids": IDS}, TypeError, "position_ids: not known"),
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
        # Releases differ in what they call it.
        name = "activation" if hasattr(lm, "activation_checkpointing_enable") else "gradient"
        for enable in (False, True, False):
            if enable:
                getattr(lm, f"{name}_checkpointing_enable")()
                lm.model.config = lm.model.config.model_copy(update={"tile": 16})
            else:
                getattr(lm, f"{name}_checkpointing_disable")()
            is_enabled = getattr(lm, f"is_{name}_checkpointing")
            assert is_enabled == enable == lm.model.config.checkpoint_global
            lm.zero_grad()
            lm(ids, labels=ids).loss.backward()
            gradients.append([p.grad.clone() for p in lm.parameters()])
        for one, other, third in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            assert torch.equal(one, third)
