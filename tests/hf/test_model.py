"""A model and its tokenizer as Hugging Face's library builds, saves, runs and publishes them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")

from transformers.generation import MaxLengthCriteria  # noqa: E402

from mblm import MBLM, MBLMReturnType  # noqa: E402
from mblm.hf import MBLMConfig, MBLMForCausalLM, MBLMTokenizer  # noqa: E402
from tests.decoding import alone  # noqa: E402
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


@pytest.mark.parametrize("kind", sorted(BLOCKS))
class TestGenerate:
    """What comes is what `MBLM.generate` gives, whoever chooses the bytes."""

    def test_the_likeliest_bytes_without_drawing_numbers(self, kind: str) -> None:
        m, prompts = build(kind), [b"some text", b"", b"more"]
        batch = MBLMTokenizer()(prompts, padding=True, return_tensors="pt")
        state = torch.get_rng_state()
        found = MBLMForCausalLM.from_mblm(m).generate(**batch, max_new_tokens=20)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(found[:, :9], batch["input_ids"])
        assert found[:, 9:].tolist() == [alone(m, prompt, 20) for prompt in prompts]

    @pytest.mark.parametrize(
        ("options", "wishes"),
        [
            ({}, {"filter_thres": 0.0}),
            ({"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_k": 5}),
            ({"top_p": 0.8}, {"top_p": 0.8}),
            ({"min_p": 0.5, "temperature": 1.5}, {"min_p": 0.5, "temperature": 1.5}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("by_the_library", [False, True], ids=["", "by the library"])
    def test_the_bytes_of_a_seed(
        self, kind: str, options: dict[str, Any], wishes: dict[str, Any], by_the_library: bool
    ) -> None:
        m = build(kind)
        torch.manual_seed(5)
        expected = alone(m, b"some", 20, **wishes)
        if by_the_library:
            options = {**options, "stopping_criteria": [lambda ids, scores, **_: False]}
        torch.manual_seed(5)
        lm = MBLMForCausalLM.from_mblm(m)
        found = lm.generate(ids_of(b"some"), do_sample=True, max_new_tokens=20, **options)
        assert found[0, 4:].tolist() == expected


class Recorder:
    """What a streamer is given."""

    def __init__(self) -> None:
        self.put_ids: list[list[int]] = []
        self.is_over = False

    def put(self, ids: Tensor) -> None:
        self.put_ids.append(ids.flatten().tolist())

    def end(self) -> None:
        self.is_over = True


class TestGenerateOptions:
    PROMPT = ids_of(b"some text")

    @pytest.fixture(params=[{}, {"output_scores": True, "return_dict_in_generate": True}])
    def generate(self, request: pytest.FixtureRequest, lm: MBLMForCausalLM) -> Callable[..., Any]:
        """``generate`` by the engine, or by the library's functions."""

        def call(ids: Tensor | None = self.PROMPT, **options: Any) -> Tensor:
            output = lm.generate(ids, **request.param, **options)
            return output.sequences if request.param else output

        return call

    def test_max_length_counts_the_prompt(self, generate: Callable[..., Tensor]) -> None:
        assert generate(max_length=14).shape == (1, 14)
        config = transformers.GenerationConfig(max_new_tokens=3)
        assert generate(generation_config=config).shape == (1, 12)
        criteria = transformers.StoppingCriteriaList([MaxLengthCriteria(13)])
        assert generate(max_new_tokens=20, stopping_criteria=criteria).shape == (1, 13)

    def test_without_a_prompt_begins_from_nothing(
        self, generate: Callable[..., Tensor], m: MBLM
    ) -> None:
        expected = m.generate(None, num_tokens_to_generate=5, enable_progress=False)
        assert torch.equal(generate(None, max_new_tokens=5)[0], expected)

    def test_several_sequences_of_a_prompt_differ(self, generate: Callable[..., Tensor]) -> None:
        found = generate(do_sample=True, num_return_sequences=3, max_new_tokens=8)
        assert found.shape == (3, 17) and len({tuple(row) for row in found.tolist()}) == 3

    def test_rows_end_at_any_end_and_are_padded(self, generate: Callable[..., Tensor]) -> None:
        prompts = ids_of(b"some text", b"and other")
        plain = generate(prompts, max_new_tokens=12)[:, 9:]
        first, second = plain[0, 3].item(), plain[1, 6].item()
        found = generate(prompts, max_new_tokens=12, eos_token_id=[first, second], pad_token_id=256)
        for row, expected in zip(found[:, 9:].tolist(), plain.tolist(), strict=True):
            end = min(expected.index(i) for i in (first, second) if i in expected) + 1
            assert row == (expected[:end] + [256] * 12)[: found.shape[1] - 9]

    def test_strings_of_any_kind_end_a_row(self, generate: Callable[..., Tensor], m: MBLM) -> None:
        with torch.no_grad():  # either byte of "é", whatever was before
            m.to_logits.weight.zero_()
            m.to_logits.bias[[195, 169]] = 20.0
        found = generate(max_new_tokens=100, do_sample=True, stop_strings=["é", "never"])
        data = bytes(found[0, 9:].tolist())
        assert data.endswith("é".encode()) and data.count("é".encode()) == 1 and len(data) < 100

    def test_a_tokenizer_changes_nothing(self, generate: Callable[..., Tensor], m: MBLM) -> None:
        tokenizer = MBLMTokenizer.of(MBLMConfig.of(m.config))
        options = {"max_new_tokens": 9, "stop_strings": "e"}
        expected = generate(**options)
        assert torch.equal(generate(tokenizer=tokenizer, **options), expected)
        options["token_healing"] = True
        assert torch.equal(generate(tokenizer=tokenizer, **options), expected)

    def test_a_streamer_gets_each_byte(self, generate: Callable[..., Tensor]) -> None:
        streamer = Recorder()
        found = generate(max_new_tokens=6, streamer=streamer)
        assert streamer.put_ids == [self.PROMPT[0].tolist(), *([i] for i in found[0, 9:].tolist())]
        assert streamer.is_over

    def test_processors_and_criteria_have_their_say(self, lm: MBLMForCausalLM) -> None:
        def only_digits(ids: Tensor, scores: Tensor) -> Tensor:
            assert ids.shape[1] >= 9 and scores.shape == (1, 257)
            digits = torch.full_like(scores, -torch.inf)
            digits[:, 48:58] = scores[:, 48:58]
            return digits

        def ends_after_4(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 13)

        found = lm.generate(
            self.PROMPT,
            do_sample=True,
            max_new_tokens=9,
            logits_processor=transformers.LogitsProcessorList([only_digits]),
            stopping_criteria=transformers.StoppingCriteriaList([ends_after_4]),
        )
        assert found.shape == (1, 13) and all(48 <= i < 58 for i in found[0, 9:].tolist())
        bias = {(i,): -1e9 for i in range(48, 257)}
        assert lm.generate(self.PROMPT, max_new_tokens=5, sequence_bias=bias)[0, 9:].max() < 48

    def test_scores_and_logits_are_returned(self, lm: MBLMForCausalLM) -> None:
        output = lm.generate(
            self.PROMPT,
            do_sample=True,
            temperature=0.5,
            max_new_tokens=3,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert len(output.scores) == len(output.logits) == 3
        expected = logits_of(lm, output.sequences)[0, 8:11]
        torch.testing.assert_close(torch.cat(output.logits), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.scores[1], output.logits[1] / 0.5)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"num_beams": 2}, "only supports"),
            ({"prompt_lookup_num_tokens": 2}, "only supports"),
            ({"max_new_tokens": 112}, "112 bytes after a prompt of 9 exceed the context of 120"),
            ({"attention_mask": torch.tensor([[1, 0, 1] * 3])}, "gaps"),
            ({"inputs_embeds": torch.ones(1, 2, 8)}, "inputs_embeds"),
            ({"max_new_token": 3}, "max_new_token"),
            ({"stop_strings": [""]}, r"stop_strings: expected texts, none empty, got \[''\]"),
            ({"stop_strings": [3]}, "stop_strings: expected texts"),
            ({"stop_strings": 3}, "stop_strings: expected texts"),
        ],
    )
    def test_what_is_not_there_is_refused(
        self, lm: MBLMForCausalLM, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            lm.generate(self.PROMPT, **{"max_new_tokens": 3, **options})
        with pytest.raises(NotImplementedError, match="generate_batch"):
            lm.generate_batch([[1, 2]])

    @pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (0, 3), ()])
    @pytest.mark.parametrize("name", ["inputs", "input_ids"])
    def test_ids_are_rows(self, lm: MBLMForCausalLM, shape: tuple[int, ...], name: str) -> None:
        with pytest.raises(ValueError, match=r"input_ids: expected shape \(B, L\)"):
            lm.generate(**{name: torch.ones(shape, dtype=torch.long)}, max_new_tokens=3)
        with pytest.raises(TypeError, match="input_ids: expected a tensor"):
            lm.generate(**{name: [[1, 2]]}, max_new_tokens=3)


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
