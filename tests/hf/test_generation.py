"""`generate` of a model as Hugging Face's: whoever chooses the bytes, and each of its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")

from transformers.generation import MaxLengthCriteria  # noqa: E402

from mblm import MBLM  # noqa: E402
from mblm.hf import MBLMConfig, MBLMForCausalLM, MBLMTokenizer  # noqa: E402
from tests.decoding import alone  # noqa: E402
from tests.hf.models import BLOCKS, build, ids_of, logits_of  # noqa: E402


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
