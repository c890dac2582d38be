"""Bytes as tokens: whatever goes in comes out, in the library's ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", reason="the extra hf is NOT tested")

from mblm.hf import MBLMConfig, MBLMTokenizer  # noqa: E402
from tests.models import model, transformer  # noqa: E402

TEXTS = ["", "plain", "häßlich 日本 🙂", "a<256>b\x00\r\n", "  spaces  \t"]
TOKENIZER = MBLMTokenizer()


class TestRoundTrips:
    @pytest.mark.parametrize("text", TEXTS)
    def test_of_text(self, text: str) -> None:
        ids = TOKENIZER(text)["input_ids"]
        assert ids == list(text.encode()) and TOKENIZER.decode(ids) == text
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
        assert TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(text)) == ids
        assert TOKENIZER.convert_tokens_to_string(TOKENIZER.convert_ids_to_tokens(ids)) == text

    @given(st.binary(max_size=50))
    def test_of_any_bytes(self, data: bytes) -> None:
        ids = TOKENIZER(data)["input_ids"]
        assert ids == list(data)
        text = TOKENIZER.decode(ids, errors="surrogateescape")
        assert text.encode("utf-8", "surrogateescape") == data
        assert TOKENIZER(text)["input_ids"] == ids
        assert TOKENIZER.decode(ids) == data.decode(errors="replace")

    def test_of_a_saved_tokenizer(self, tmp_path: Path) -> None:
        saved = MBLMTokenizer(259, "<258>", eos_token="<257>", padding_side="right")
        saved.save_pretrained(tmp_path)
        for loaded in (
            MBLMTokenizer.from_pretrained(tmp_path),
            transformers.AutoTokenizer.from_pretrained(tmp_path),
        ):
            assert type(loaded) is MBLMTokenizer and len(loaded) == 259
            assert (loaded.pad_token_id, loaded.eos_token_id) == (258, 257)
            assert loaded.padding_side == "right"
            assert loaded("a<257>")["input_ids"] == list(b"a<257>")


class TestSpecialIds:
    def test_are_those_of_the_model(self) -> None:
        config = MBLMConfig.of(
            model(transformer(), seq_lens=[3, 4], num_tokens=259, pad_token_id=258).config
        )
        tokenizer = MBLMTokenizer.of(config, eos_token="<256>")
        assert len(tokenizer) == len(tokenizer.get_vocab()) == 259
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (258, 256)

    def test_are_none_where_all_ids_are_bytes(self) -> None:
        tokenizer = MBLMTokenizer(256)
        assert len(tokenizer) == 256 and tokenizer.pad_token is None
        with pytest.raises(ValueError, match="does not have a padding token"):
            tokenizer(["a", "bc"], padding=True)

    def test_stand_for_no_text(self) -> None:
        assert TOKENIZER.decode([97, 256, 98]) == "a<256>b"
        assert TOKENIZER.decode([97, 256, 98], skip_special_tokens=True) == "ab"

    def test_are_read_from_text_where_that_is_asked_for(self) -> None:
        assert TOKENIZER("a<256>", split_special_tokens=False)["input_ids"] == [97, 256]

    @pytest.mark.parametrize("num_tokens", [0, 255])
    def test_of_too_few_ids_are_refused(self, num_tokens: int) -> None:
        with pytest.raises(ValueError, match="num_tokens: expected a number >= 256"):
            MBLMTokenizer(num_tokens)

    def test_that_there_are_not_are_refused(self) -> None:
        with pytest.raises(ValueError, match="expected one of 257"):
            TOKENIZER.decode([257])


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_are_padded_at_either_side(self, side: str) -> None:
        tokenizer = MBLMTokenizer(padding_side=side)
        batch = tokenizer(["é", b"\xff"], padding=True, return_tensors="pt")
        padded = [256, 255] if side == "left" else [255, 256]
        assert batch["input_ids"].tolist() == [[195, 169], padded]
        assert batch["attention_mask"].tolist() == [[1, 1], [int(i < 256) for i in padded]]

    def test_are_cut(self) -> None:
        batch = TOKENIZER(["abc", "de"], truncation=True, max_length=2)
        assert batch["input_ids"] == [[97, 98], [100, 101]]

    def test_of_pairs_follow_one_another(self) -> None:
        assert TOKENIZER("ab", b"c")["input_ids"] == [97, 98, 99]
        assert TOKENIZER([("ab", "c"), ("", "d")])["input_ids"] == [[97, 98, 99], [100]]


class TestOffsets:
    def offsets(self, text: Any, **arguments: Any) -> Any:
        return TOKENIZER(text, return_offsets_mapping=True, **arguments)["offset_mapping"]

    def test_are_the_characters_that_bytes_belong_to(self) -> None:
        assert self.offsets("aé!") == [(0, 1), (1, 2), (1, 2), (2, 3)]
        assert self.offsets(b"\xff\x00") == [(0, 1), (1, 2)]

    def test_of_batches_skip_padding_and_what_is_cut(self) -> None:
        found = self.offsets(["é", "abc", ""], padding=True, truncation=True, max_length=2)
        assert found == [[(0, 1), (0, 1)], [(0, 1), (1, 2)], [(0, 0), (0, 0)]]
        tensors = self.offsets(["é", "a"], padding=True, return_tensors="pt")
        assert torch.equal(tensors, torch.tensor([[[0, 1], [0, 1]], [[0, 0], [0, 1]]]))
        assert self.offsets("a", return_tensors="pt").shape == (1, 1, 2)

    def test_where_they_have_no_meaning_are_refused(self) -> None:
        with pytest.raises(ValueError, match="return_offsets_mapping"):
            TOKENIZER("a", "b", return_offsets_mapping=True)
