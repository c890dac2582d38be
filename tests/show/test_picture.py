"""The picture of `mblm show`: it is drawn whatever the bytes are."""

import io
import warnings

import pytest

pytest.importorskip("matplotlib")

from mblm.show.picture import COLUMNS, MOST_ROWS, _cells, write_picture
from tests.show.test_page import ANY, surprise_of


@pytest.mark.parametrize("data", [b"", ANY], ids=["no bytes", "any bytes"])
@pytest.mark.parametrize("suffix, begins", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_any_bytes_make_a_picture(data: bytes, suffix: str, begins: bytes) -> None:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of characters that the font lacks
        write_picture(surprise_of(data), "a $\\text$", file, suffix)
    assert file.getvalue().startswith(begins)


def test_a_picture_names_text_and_bits() -> None:
    file = io.BytesIO()
    write_picture(surprise_of(b"abc\n" * 100), "a text\udcff", file, ".svg")
    drawn = file.getvalue().decode()
    for words in ("a text", "400 bytes", "of which the first 240 are shown"):
        assert f"<!-- {words}" in drawn or words in drawn


@pytest.mark.parametrize("line", [b"ab\n", b"", b"\xff"])
def test_cells_follow_each_other_in_the_picture(line: bytes) -> None:
    cells = list(_cells(line * 9999 or b"x" * 9999))
    assert cells[-1][0] == MOST_ROWS - 1
    assert all(column + columns <= COLUMNS for _, column, columns, _, _ in cells)
    assert cells == sorted(cells, key=lambda cell: cell[:2])
