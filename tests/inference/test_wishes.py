"""What may be wished is told where it is wished for."""

import inspect
from typing import Any

import pytest

from mblm import MBLM, Session
from mblm.inference.wishes import Filters, Wishes, WishesOfMany, WishesOfPrompts


@pytest.mark.parametrize(
    ("method", "wishes"),
    [
        (MBLM.generate, Filters),
        (MBLM.generate_batch, WishesOfPrompts),
        (MBLM.stream, Wishes),
        (Session.generate, WishesOfMany),
    ],
    ids=["generate", "generate_batch", "stream", "session"],
)
def test_help_names_every_keyword(method: Any, wishes: Any) -> None:
    text = inspect.getdoc(method)
    assert text is not None
    for name in wishes.__optional_keys__:
        assert f"``{name}``" in text
