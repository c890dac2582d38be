"""Special tokens before, behind and as padding."""

import pytest
import torch

from mblm.data.utils import Tokenizer, TokenizerOptions

TOKENIZE = Tokenizer(TokenizerOptions(10, 11, 12, 13)).pipeline


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("size", [0, 3])
def test_special_tokens(dtype: torch.dtype, size: int) -> None:
    ids = torch.arange(size).to(dtype)
    row = ids.tolist()
    assert TOKENIZE(ids).with_som_text().with_eom().to_long_tensor().tolist() == [12, *row, 11]
    assert TOKENIZE(ids).with_som_image().to_long_tensor().tolist() == [13, *row]
    padded = TOKENIZE(ids).with_eom().pad_right_to(6).to_long_tensor()
    assert padded.tolist() == [*row, 11] + [10] * (5 - size)
    assert padded.dtype == torch.int64


def test_a_token_that_is_none_is_left_out() -> None:
    tokenize = Tokenizer(
        TokenizerOptions(
            pad_token_id=0, eom_token_id=None, som_text_token_id=None, som_image_token_id=None
        )
    ).pipeline
    ids = torch.tensor([200], dtype=torch.uint8)
    everything = tokenize(ids).with_som_text().with_som_image().with_eom()
    assert everything.to_long_tensor().tolist() == [200]


def test_what_is_too_long_is_refused_or_cut_off() -> None:
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="to_length: 4 ids do not fit into 3"):
        TOKENIZE(ids).pad_right_to(3)
    assert TOKENIZE(ids).pad_right_to(3, strict=False).to_long_tensor().tolist() == [0, 1, 2]
    assert TOKENIZE(ids).pad_right_to(4).to_long_tensor().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_only_rows_have_special_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tensor: expected 1 dimension"):
        TOKENIZE(torch.zeros(shape))
