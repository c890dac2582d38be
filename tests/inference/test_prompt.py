"""Prompts as people have them, and what comes out as bytes and text."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

import mblm
from mblm.inference.prompt import prompt_ids

IDS = [104, 195, 169, 0, 255]
BYTES = b"h\xc3\xa9\x00\xff"


@pytest.mark.parametrize(
    "prompt",
    [
        BYTES,
        bytearray(BYTES),
        memoryview(BYTES),
        memoryview(BYTES[::-1])[::-1],
        IDS,
        tuple(IDS),
        deque(IDS),
        [np.uint8(104), torch.tensor(195), 169, 0, 255],
        torch.tensor(IDS),
        torch.tensor([IDS]),
        torch.tensor(IDS, dtype=torch.uint8),
        torch.tensor(IDS, dtype=torch.int32).repeat_interleave(2)[::2],
        np.array(IDS),
        np.array([IDS], dtype=np.uint8),
        np.array(IDS, dtype=">i4"),
        np.array(IDS[::-1], dtype=np.uint16)[::-1],
        np.frombuffer(BYTES, dtype=np.uint8),
    ],
    ids=lambda prompt: f"{type(prompt).__name__} {getattr(prompt, 'dtype', '')}",
)
def test_of_any_kind(prompt: Any) -> None:
    ids = prompt_ids("prompt", prompt, 257)
    assert ids.tolist() == IDS and ids.dtype == torch.long and ids.device.type == "cpu"


@pytest.mark.parametrize(
    "prompt",
    [b"", bytearray(), memoryview(b""), "", [], (), np.zeros(0, int), torch.zeros(1, 0).long()],
)
def test_empty(prompt: Any) -> None:
    ids = prompt_ids("prompt", prompt, 257)
    assert ids.shape == (0,) and ids.dtype == torch.long


def test_text_is_utf8() -> None:
    assert prompt_ids("prompt", "hé€🙂", 257).tolist() == list("hé€🙂".encode())


def test_what_was_given_may_change_afterwards() -> None:
    given = bytearray(b"abc")
    ids = prompt_ids("prompt", given, 257)
    given[0] = 0
    assert ids.tolist() == [97, 98, 99]


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        (None, TypeError, "prime: expected bytes, text or token ids, got NoneType"),
        ({1, 2}, TypeError, "prime: .* got set"),
        ([1, 2.0], TypeError, r"prime\[1\]: expected an integer, got 2.0"),
        ([True], TypeError, r"prime\[0\]: expected an integer, got True"),
        ([b"abc"], TypeError, r"prime\[0\]: expected an integer"),
        ([1, 300], ValueError, r"prime: token id 300 at position \(1,\) is outside \[0, 257\)"),
        ([-1], ValueError, "prime: token id -1"),
        ([3, 2**70], ValueError, f"prime: {2**70} is no token id"),
        (torch.zeros(2), TypeError, "prime: expected integer token ids .* got torch.float32"),
        (torch.tensor(3), ValueError, r"prime: expected shape \(L,\), got \(\)"),
        (torch.zeros(2, 3).long(), ValueError, r"prime: expected shape \(L,\), got \(2, 3\)"),
        (torch.zeros(2).long().to("meta"), ValueError, "prime: .* with values, got .* on meta"),
        (torch.ones(1, 2).long().to_sparse(), ValueError, "prime: .* got torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2).long()]), ValueError, "prime: .* got nested"),
        (np.zeros(2), TypeError, "prime: .* got an array of float64"),
        (np.array([1, None]), TypeError, "prime: .* got an array of object"),
        ("\udc80", ValueError, "prime: expected text that UTF-8 can encode"),
    ],
)
def test_anything_else_is_refused_by_name(prompt: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prompt_ids("prime", prompt, 257)


def test_bytes_that_a_small_vocabulary_lacks() -> None:
    with pytest.raises(ValueError, match=r"token id 97 at position \(0,\) is outside \[0, 19\)"):
        prompt_ids("prompt", "abc", 19)


class TestBack:
    def test_to_bytes(self) -> None:
        assert mblm.to_bytes(torch.tensor(IDS)) == BYTES
        assert mblm.to_bytes([*IDS[:2], 256, 10**6, *IDS[2:]]) == BYTES
        assert mblm.to_bytes(torch.empty(0, dtype=torch.long)) == b""
        assert mblm.to_bytes(torch.tensor([IDS])) == BYTES

    def test_to_text(self) -> None:
        assert mblm.to_text(list("hé€🙂".encode())) == "hé€🙂"
        assert mblm.to_text(IDS) == "hé\x00\ufffd"
        assert mblm.to_text(IDS, errors="ignore") == "hé\x00"
        with pytest.raises(UnicodeDecodeError):
            mblm.to_text(IDS, errors="strict")

    def test_refuses_several_sequences_and_what_is_negative(self) -> None:
        with pytest.raises(ValueError, match=r"ids: expected shape \(L,\), got \(2, 3\)"):
            mblm.to_bytes(torch.zeros(2, 3).long())
        with pytest.raises(ValueError, match=r"ids: token id -1 at position \(0,\) is negative$"):
            mblm.to_bytes([-1])
