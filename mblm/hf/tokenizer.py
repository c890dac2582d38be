"""Bytes as tokens, with the face of Hugging Face's tokenizers."""

from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from mblm.hf.config import MBLMConfig
from mblm.utils.checks import check_integer

_BYTES = 256


class MBLMTokenizer(PreTrainedTokenizer):
    """Token i is byte i; ids from 256 on are special and stand for no text.

    Text is encoded as UTF-8, and decoded with U+FFFD for what is none. Any bytes survive the way to
    text and back with ``decode(ids, errors="surrogateescape")``. Wherever the library takes a text,
    this tokenizer takes ``bytes``, too. The names of special tokens are text like any other, unless
    ``split_special_tokens=False``.

    Args:
        num_tokens: Size of the vocabulary, V >= 256. Default 257.
        pad_token: The special token that pads: ``"<256>"`` is that of id 256, and so on. Default:
            that of id 256, if there is one.
        **kwargs: Those of the library, such as ``eos_token``, ``padding_side`` (default "left", as
            generation wants it) and ``model_max_length``.

    Raises:
        ValueError: ``num_tokens`` below 256.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self, num_tokens: int = 257, pad_token: str | AddedToken | None = None, **kwargs: Any
    ) -> None:
        check_integer("num_tokens", num_tokens, _BYTES)
        specials = {
            i: AddedToken(special_token(i), special=True) for i in range(_BYTES, num_tokens)
        }
        self._added_tokens_decoder = specials
        if pad_token is None and specials:
            pad_token = special_token(_BYTES)
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(num_tokens=num_tokens, pad_token=pad_token, **kwargs)

    @classmethod
    def of(cls, config: MBLMConfig, **kwargs: Any) -> "MBLMTokenizer":
        """The tokenizer of a model, by its configuration; ``kwargs`` as those of the class."""
        if config.pad_token_id >= _BYTES:
            kwargs.setdefault("pad_token", special_token(config.pad_token_id))
        kwargs.setdefault("model_max_length", config.max_position_embeddings)
        return cls(config.num_tokens, **kwargs)

    @property
    def vocab_size(self) -> int:
        """How many ids are bytes; ``len`` counts the special ones, too."""
        return _BYTES

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens; that of byte i is ``chr(i)``."""
        return {chr(i): i for i in range(_BYTES)} | self.added_tokens_encoder

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special ones are their names."""
        return self._decode([self._added_tokens_encoder.get(t) or ord(t) for t in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        """Nothing: the vocabulary is that of all models of bytes."""
        return ()

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in _utf8(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < _BYTES else None

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < _BYTES:
            raise ValueError(f"id {index}: expected one of {len(self)} tokens")
        return chr(index)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **_: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        data = bytearray()
        for i in ids:
            if i in skipped:
                continue
            if 0 <= i < _BYTES:
                data.append(i)
            else:
                data += self.convert_ids_to_tokens(i).encode()
        return data.decode("utf-8", errors)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        return_offsets_mapping: bool = False,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        plain = kwargs.get("split_special_tokens", True) and not kwargs.get("is_split_into_words")
        ids, pair = (_ids(t) if plain else t for t in (text, text_pair))
        if not return_offsets_mapping:
            return super()._encode_plus(
                ids,
                pair,
                return_attention_mask=return_attention_mask,
                return_tensors=return_tensors,
                **kwargs,
            )
        if not plain or pair is not None or kwargs.get("return_overflowing_tokens"):
            raise ValueError(
                "return_offsets_mapping: expected texts alone, without pairs, words, overflowing "
                "tokens and special tokens in the text"
            )
        encoded = super()._encode_plus(ids, return_attention_mask=True, **kwargs)
        masks, is_batch = encoded["attention_mask"], isinstance(text, (list, tuple))
        texts, masks = (text, masks) if is_batch else ([text], [masks])
        offsets = [self._offsets(t, mask) for t, mask in zip(texts, masks, strict=True)]
        encoded["offset_mapping"] = offsets if is_batch else offsets[0]
        if return_attention_mask is False:
            del encoded["attention_mask"]
        return BatchEncoding(
            dict(encoded), tensor_type=return_tensors, prepend_batch_axis=not is_batch
        )

    def _offsets(self, text: str | bytes, mask: list[int]) -> list[tuple[int, int]]:
        """Which characters of a text, or bytes, the tokens belong to; (0, 0) for padding."""
        widths = (len(_utf8(c)) for c in text) if isinstance(text, str) else (1 for _ in text)
        offsets = [(i, i + 1) for i, width in enumerate(widths) for _ in range(width)]
        first = 0 if self.truncation_side == "right" else len(offsets) - sum(mask)
        kept = iter(offsets[first:])
        return [next(kept) if is_byte else (0, 0) for is_byte in mask]


def special_token(token_id: int) -> str:
    """The name of a special token."""
    return f"<{token_id}>"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _ids(text: Any) -> Any:
    """Texts and bytes as the ids that they are; an empty text stays one, as the library wants."""
    if isinstance(text, str):
        text = _utf8(text)
    if isinstance(text, (bytes, bytearray, memoryview)):
        return list(text) or ""
    if isinstance(text, (list, tuple)) and text and not isinstance(text[0], int):
        return type(text)(_ids(item) for item in text)
    return text
