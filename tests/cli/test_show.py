"""`mblm show`: a page or a picture, and nothing lost where there is none."""

import sys
from pathlib import Path
from typing import Any

import pytest

import mblm.cli.show
import mblm.show.surprise
from mblm import MBLM
from mblm.show.surprise import measure
from tests.cli.program import Run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(b"The cat \xff sat\x00")
    return tmp_path / "text"


def test_a_page(run: Run, saved: Path, bytes_model: MBLM, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("show", saved, text, "--out", out)
    expected = measure(bytes_model, text.read_bytes())
    assert (result.status, result.out.decode()) == (0, f"Wrote {out}: {expected}\n"), result.err
    assert str(expected) in out.read_text() and str(text) in out.read_text()


def test_a_picture(run: Run, saved: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("show", saved, text, "--out", tmp_path / "a.PNG").status == 0
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_standard_input(
    run: Run, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with text.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run("show", saved, "-", "--out", tmp_path / "page.html").status == 0
    assert '"standard input"' in (tmp_path / "page.html").read_text()


def test_a_name_that_is_no_text(run: Run, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "a\udcff.txt"
    try:
        file.write_bytes(b"abc")
    except (OSError, UnicodeError):
        pytest.skip("no such names here")
    assert run("show", saved, file, "--out", tmp_path / "page.html").status == 0
    assert "a\\ufffd.txt" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["SAVED", "absent"], "absent: No such file"),
        (["SAVED", "."], ".: Is a directory"),
        (["absent", "TEXT"], "neither a folder nor a model id"),
        (
            ["SAVED", "TEXT", "--out", "page.txt"],
            "expected a name that ends in .html, .png or .svg",
        ),
        (["SAVED", "TEXT", "--out", "absent/page.html"], "in a folder that does not exist"),
        (["SAVED", "PAGE", "--out", "PAGE"], "is read by this command and would be lost"),
        (["SAVED", "LARGE"], "more than 20 bytes; pass a part"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    run: Run,
    saved: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mblm.cli.show, "MOST_BYTES", 20)
    files = {"SAVED": saved, "TEXT": text, "PAGE": tmp_path / "a.html", "LARGE": tmp_path / "large"}
    files["PAGE"].write_bytes(b"abc")
    files["LARGE"].write_bytes(b"a" * 21)
    before = sorted(tmp_path.iterdir())
    result = run("show", *(files.get(word, word) for word in arguments))
    assert result.status == 1 and message in result.error
    assert sorted(tmp_path.iterdir()) == before and files["PAGE"].read_bytes() == b"abc"


def test_a_page_is_kept_where_none_takes_its_place(
    run: Run, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "page.html"
    out.write_bytes(b"old")
    monkeypatch.setattr(mblm.show.surprise, "measure", interrupted)
    before = sorted(tmp_path.iterdir())
    assert run("show", saved, text, "--out", out).status == 130
    assert out.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == before


def test_pictures_say_what_they_need(
    run: Run, saved: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("show", saved, text, "--out", "a.png")
    assert result.error == "mblm: error: pictures need matplotlib: pip install 'mblm[plot]'\n"
