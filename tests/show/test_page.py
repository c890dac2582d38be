"""The page of `mblm show` in a real browser: how it is drawn and what it tells of any bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mblm.show.page import write_page
from mblm.show.surprise import Surprise
from tests.browser import CHROMIUM, DRIVER, Browser, browser

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver")

ALL = bytes(range(256))
ANY = (
    b"A line\r\n\tand </script><b id=broken>another</b> <!-- &amp;\n"
    + "Grüße, 日本 🙂 e\u0301 \u202e\u05d0\u0000\ufeff\n".encode()
    + b"\xf0\x9f\x99 \xed\xa0\x80 \xff\xfe\x00"
    + ALL
)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def surprise_of(data: bytes, patches: tuple[int, ...] = (12, 4), num_tokens: int = 257) -> Surprise:
    """Of no model: byte n takes n % 26 bits, and the two ids after it are likelier."""
    ids = np.frombuffer(data, np.uint8).astype(np.int64)
    return Surprise(
        data=data,
        bits=(np.arange(len(ids)) % 26).astype(np.float32),
        alternatives=np.stack([(ids + n) % num_tokens for n in (1, 2, 0)], axis=1),
        probabilities=np.tile(np.float32([0.5, 0.25, 0.004]), (len(ids), 1)),
        places=np.arange(len(ids)),
        counts=np.ones(len(ids), bool),
        patches=list(patches),
    )


@pytest.fixture
def show(window: Browser, tmp_path: Path) -> Any:
    def show(data: bytes, name: str = "a text", **arguments: Any) -> Browser:
        page = tmp_path / "page.html"
        with page.open("wb") as file:
            write_page(surprise_of(data, **arguments), name, file)
        window.resize(1000, 700)
        window.open(page)
        window.run("return new Promise(drawn => setTimeout(drawn, 0))")
        assert window.run(SPANS) or not data
        assert window.complaints() == []
        return window

    return show


SPANS = """return [...document.querySelectorAll("#view span")].map(s =>
    ({first: s.first, text: s.textContent, is_hex: s.className == "hex"}))"""
BOX = """const box = [...document.querySelectorAll("#view span")].find(s => s.first == arguments[0])
    .getBoundingClientRect(); return [box.left, box.top, box.width, box.height]"""
TIP = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.innerText"


SCROLL = """const main = document.getElementById("text");
    main.scrollTop = arguments[0] * (main.scrollHeight - main.clientHeight);
    return new Promise(drawn => setTimeout(drawn, 100))"""


def scroll_to(window: Browser, part: float) -> None:
    window.run(SCROLL, part)


def point_at_byte(window: Browser, first: int, part: float = 0.5) -> str | None:
    """What is told where the mouse is at a part of the width of the character of a byte."""
    left, top, width, height = window.run(BOX, first)
    window.point_at(left + part * width, top + height / 2)
    tip: str | None = window.run(TIP)
    return tip


def test_all_bytes_are_drawn_in_order_and_escaped(show: Any) -> None:
    window = show(ANY, name="</script><b id=broken>")
    spans = window.run(SPANS)
    seen = b""
    for span in spans:
        assert span["first"] == len(seen)
        if span["is_hex"]:
            seen += bytes.fromhex(span["text"])
        else:
            text = span["text"].translate({0x2192: "\t", 0x21B5: "\n", 0x25CC: None})
            seen += text.encode()
    assert seen == ANY
    hidden = {0x0D, 0x00, 0xFF, 0x7F, 0x1B}
    assert all(span["is_hex"] for span in spans if ANY[span["first"]] in hidden)
    for character in ("\u202e", "\ufeff", "\u0000"):  # would be invisible, or turn the text around
        assert not any(character in span["text"] for span in spans)
    assert window.run("return document.getElementById('broken')") is None
    assert window.run("return document.title") == "</script><b id=broken>"


def test_a_byte_that_is_pointed_at_tells_its_bits_and_what_is_likelier(show: Any) -> None:
    window = show(b"The cat sat\non the mat")
    assert point_at_byte(window, 4).splitlines() == [
        "63 c: 4.0 bits",
        "byte 5",
        "\u00a064 d\t50 %\t",
        "\u00a065 e\t25 %\t",
        "\u25b863 c\t< 1 %\t",
        "stage 1: byte 5 of 12 of its patch",
        "stage 2: byte 1 of 4 of its patch",
    ]
    assert "0A \\n: 11.0 bits" in point_at_byte(window, 11)
    window.point_at(5, 5)  # the title
    assert window.run(TIP) is None


def test_each_byte_of_a_character_is_told_of(show: Any) -> None:
    window = show("a日b".encode())
    assert [point_at_byte(window, 1, part).splitlines()[:2] for part in (1 / 6, 1 / 2, 5 / 6)] == [
        ["E6: 1.0 bits", "byte 2, 1 of 3 of 日"],
        ["97: 2.0 bits", "byte 3, 2 of 3 of 日"],
        ["A5: 3.0 bits", "byte 4, 3 of 3 of 日"],
    ]


def test_ids_that_are_no_bytes_have_numbers(show: Any) -> None:
    window = show(b"\xff\xff")
    assert "id 256, no byte" in point_at_byte(window, 0)


def test_colors_follow_the_bits_and_bars_the_means(show: Any) -> None:
    window = show(b"abcdefghijkl" * 4)
    style = window.run(
        "return [...document.querySelectorAll('#view span')].map(s => s.style.cssText)"
    )
    assert "/ 0)" in style[0] and "/ 0.425)" in style[5] and "/ 0.85)" in style[20]
    captions = window.run("return document.getElementById('stages').innerText")
    assert "stage 1: mean bits by place in its patch of 12 bytes" in captions
    assert "byte 1: 11.50" in captions  # (0 + 12 + 24 + 10) / 4
    bars = window.run("return [...document.querySelectorAll('.bars')].map(b => b.children.length)")
    assert bars == [12, 4]
    titles = window.run("return [...document.querySelectorAll('.bars i')].map(b => b.title)")
    assert titles[0] == "byte 1: 11.50 bits"


def test_a_patch_of_many_bytes_has_bars_of_several(show: Any) -> None:
    window = show(b"a" * 500, patches=(100,))
    titles = window.run("return [...document.querySelectorAll('.bars i')].map(b => b.title)")
    assert len(titles) == 64
    assert titles[0].startswith("byte 1 to 2: ") and titles[-1].startswith("byte 100: ")


def test_no_bytes_and_no_patches(show: Any) -> None:
    window = show(b"", patches=())
    assert window.run("return document.getElementById('total').innerText") == "0 bytes"
    assert window.run(SPANS) == []


@pytest.mark.parametrize(
    "line", [b"The cat sat on the mat.\n", b"\n", b"x"], ids=["text", "empty lines", "one line"]
)
def test_a_megabyte_can_be_scrolled_to_its_end(show: Any, line: bytes, tmp_path: Path) -> None:
    data = (line * (1_000_000 // len(line) + 1))[:1_000_000]
    window = show(data)
    counts = [len(window.run(SPANS))]
    assert window.run(SPANS)[0]["first"] == 0
    scroll_to(window, 1)
    spans = window.run(SPANS)
    assert spans[-1]["first"] == 999_999
    assert max(*counts, len(spans)) < 10_000  # what can be seen, not what there is
    assert "byte 1,000,000" in point_at_byte(window, 999_999)
    assert window.complaints() == []


def test_what_is_seen_stays_in_a_window_of_another_size(show: Any) -> None:
    window = show(b"The cat sat on the mat and on the dog. " * 999)
    scroll_to(window, 0.4)
    first = window.run(SPANS)[0]["first"]
    window.resize(600, 900)
    window.run("return new Promise(drawn => setTimeout(drawn, 100))")
    rows = window.run(SPANS)
    assert rows[0]["first"] <= first < rows[100]["first"]
