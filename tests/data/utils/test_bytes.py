"""Bytes in and out of text and tensors, and files in memory."""

from io import BytesIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mblm.data.utils import Bytes, FileStream


@settings(deadline=None, max_examples=30)
@given(text=st.text())
def test_text_goes_there_and_back(text: str) -> None:
    tensor = Bytes.str_to_tensor(text)
    assert tensor.dtype == torch.uint8
    assert tensor.tolist() == list(text.encode())
    assert Bytes.tensor_to_str(tensor) == Bytes.tensor_to_str(tensor.long()) == text
    assert Bytes.bytes_to_str(Bytes.str_to_bytes(text)) == text
    assert Bytes.bytes_to_str(Bytes.str_to_bytearray(text)) == text
    assert Bytes.byte_list_to_str(tensor.tolist()) == text


def test_other_encodings() -> None:
    assert Bytes.str_to_tensor("é", "latin1").tolist() == [0xE9]
    assert Bytes.tensor_to_str(torch.tensor([0xE9]), "latin1") == "é"


@pytest.mark.parametrize("values", [[255], [256], [-1], [0xC3]])
def test_what_is_no_text_raises_or_is_replaced(values: list[int]) -> None:
    with pytest.raises(ValueError):
        Bytes.byte_list_to_str(values)
    assert Bytes.byte_list_to_str_safe(values, default="?") == "?"
    assert Bytes.byte_list_to_str_safe([97], default="?") == "a"


def test_a_tensor_shares_the_memory_of_a_bytearray_only() -> None:
    mutable, constant = bytearray(b"abc"), b"abc"
    Bytes.bytes_to_tensor(mutable)[0] = 0
    Bytes.bytes_to_tensor(constant)[0] = 0
    assert (mutable, constant) == (b"\0bc", b"abc")


@pytest.mark.parametrize("empty", [b"", bytearray()])
def test_nothing_is_an_empty_tensor(empty: bytes) -> None:
    assert Bytes.bytes_to_tensor(empty).shape == (0,)
    assert FileStream(BytesIO(empty)).to_tensor().shape == (0,)
    assert FileStream(BytesIO(empty)).to_numpy().shape == (0,)


def test_a_file_in_memory() -> None:
    stream = FileStream(BytesIO(b"abc"))
    assert stream.to_tensor().tolist() == stream.to_numpy().tolist() == list(b"abc")
    assert stream.to_buffer() == b"abc"


def test_an_image_in_memory() -> None:
    buffer, pixels = BytesIO(), torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    Bytes.tensor_to_image(pixels).save(buffer, "PNG")
    image = FileStream(buffer).to_image()
    assert isinstance(image, Image.Image)
    assert image.size == (5, 4)
    assert image.getpixel((2, 1)) == tuple(pixels[:, 1, 2].tolist())
