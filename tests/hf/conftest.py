"""A model, as ours and as Hugging Face's, and a tokenizer; imported where they are asked for."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mblm import MBLM
    from mblm.hf import MBLMForCausalLM, MBLMTokenizer


@pytest.fixture
def m() -> "MBLM":
    from tests.hf.models import build

    return build()


@pytest.fixture
def lm(m: "MBLM") -> "MBLMForCausalLM":
    from mblm.hf import MBLMForCausalLM

    return MBLMForCausalLM.from_mblm(m)


@pytest.fixture
def tokenizer() -> "MBLMTokenizer":
    from mblm.hf import MBLMTokenizer

    return MBLMTokenizer()
