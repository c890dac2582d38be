"""Which files an entry means, and in which order."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from mblm.data.find_files import find_files

TREE = [
    "b.txt",
    "a.txt",
    "a/z.txt",
    "a/deep/y.md",
    "a-b/x.txt",
    "[odd].txt",
    ".hidden.txt",
    ".git/config",
    "a/.cache/w.txt",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "tree"


def names(tree: Path, *entries: str) -> list[str]:
    return [os.path.relpath(file, tree) for file in find_files(tree, entries).values()]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["."], ["[odd].txt", "a/deep/y.md", "a/z.txt", "a-b/x.txt", "a.txt", "b.txt"]),
        (["b.txt", "a.txt"], ["b.txt", "a.txt"]),
        (["a"], ["a/deep/y.md", "a/z.txt"]),
        (["*.txt"], ["[odd].txt", "a.txt", "b.txt"]),
        (["**/*.md", "a"], ["a/deep/y.md", "a/z.txt"]),
        (["a*/*.txt"], ["a/z.txt", "a-b/x.txt"]),
        (["[odd].txt"], ["[odd].txt"]),
        (["**"], ["[odd].txt", "a/deep/y.md", "a/z.txt", "a-b/x.txt", "a.txt", "b.txt"]),
        (["a/**"], ["a/deep/y.md", "a/z.txt"]),
        (["./a/../*/x.*"], ["a-b/x.txt"]),
        (["**/.cache/*"], ["a/.cache/w.txt"]),
        (["a.t[x]t", "[!b].txt"], ["a.txt"]),
        ([".hidden.txt", ".git"], [".hidden.txt", ".git/config"]),
        (["a/../a.txt", "a.txt"], ["a.txt"]),
    ],
    ids=" ".join,
)
def test_entries(tree: Path, entries: list[str], found: list[str]) -> None:
    assert names(tree, *entries) == found


def test_absolute_entries_mean_themselves(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").touch()
    entries = [str(tmp_path / "elsewhere.txt"), str(tree / "a*" / "*.txt")]
    assert names(tree, *entries) == ["../elsewhere.txt", "a/z.txt", "a-b/x.txt"]


def test_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree / "a"))
    assert names(Path("/"), f"{tree}/b.txt") == [os.path.relpath(tree / "b.txt", "/")]
    assert names(tree, "~/z.txt", "~/*/y.md", "~") == ["a/z.txt", "a/deep/y.md"]


@pytest.mark.parametrize("folder", ["v[1]", "a [draft] *"])
def test_a_folder_whose_name_looks_like_a_pattern(tree: Path, folder: str) -> None:
    (tree / "v1").mkdir()  # which the pattern would find
    (tree / folder).mkdir()
    (tree / folder / "w.txt").touch()
    assert names(tree, folder) == names(tree, f"{folder}/w.txt") == [f"{folder}/w.txt"]
    assert names(tree / folder, "*.txt") == ["w.txt"]


def test_a_folder_that_cannot_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(folder: Path) -> Any:
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="a/deep"):
        find_files(tree, ["."])


def test_links_count_once_and_loops_end(tree: Path) -> None:
    (tree / "a" / "up").symlink_to(tree)
    (tree / "c.txt").symlink_to("b.txt")
    (tree / "broken.txt").symlink_to("nothing")
    found = ["[odd].txt", "a/z.txt", "a-b/x.txt", "a.txt", "b.txt"]
    assert names(tree, "**/*.txt") == found
    assert [name for name in names(tree, ".") if name.endswith(".txt")] == found
    assert names(tree, "a/up*/a/z.txt") == ["a/up/a/z.txt"]
    assert names(tree, "c.txt", "b.txt") == ["c.txt"], "the name that comes first"


def test_pipes_are_no_files(tree: Path) -> None:
    os.mkfifo(tree / "a-b" / "pipe")
    assert names(tree, "a-b") == ["a-b/x.txt"]


@pytest.mark.parametrize("entry", ["nothing.txt", "*.nothing", "empty", "a.txt/b"])
def test_an_entry_without_files_is_refused(tree: Path, entry: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=rf"files: no file of '{re.escape(entry)}' in .*tree'"
    ):
        find_files(tree, ["a.txt", entry])


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["."], ["[odd].txt", "a-b/x.txt", "a.txt", "b.txt"]),
        (["**/*.txt"], ["[odd].txt", "a-b/x.txt", "a.txt", "b.txt"]),
        (["b.txt", "a"], ["b.txt", "a/deep/y.md", "a/z.txt"]),
        (["a/*.txt"], ["a/z.txt"]),
    ],
    ids=" ".join,
)
def test_a_folder_is_left_out_unless_an_entry_is_in_it(
    tree: Path, entries: list[str], found: list[str]
) -> None:
    files = find_files(tree, entries, without=tree / "a-b" / ".." / "a").values()
    assert [os.path.relpath(file, tree) for file in files] == found


def test_a_folder_that_is_left_out_may_have_all_there_is(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="files: no file in "):
        find_files(tmp_path, ["."], without=tree)
    assert find_files(tree / "a", ["."], without=tree)
