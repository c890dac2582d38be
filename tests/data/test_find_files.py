"""Which files an entry means, and in which order."""

import os
import re
from pathlib import Path

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


@pytest.mark.parametrize("folder", ["v[1]", "[ab]", "a [draft] *", "?[!x]"])
def test_a_folder_whose_name_looks_like_a_pattern(tree: Path, folder: str) -> None:
    for name in (folder, "v1", "b"):  # of which patterns would find others
        (tree / name).mkdir(exist_ok=True)
        (tree / name / "w.txt").touch()
    assert names(tree, f"{folder}/*.txt") == [f"{folder}/w.txt"]
    assert names(tree, f"{folder}/**/w.t?t") == [f"{folder}/w.txt"]
    assert names(tree / folder, "*.txt") == ["w.txt"]


def test_a_file_named_like_a_pattern_hides_no_others(tree: Path) -> None:
    for name in ("*", "**"):
        (tree / "a-b" / name).touch()
    assert names(tree, "a-b") == ["a-b/*", "a-b/**", "a-b/x.txt"]


def test_many_loops_of_links_end(tree: Path) -> None:
    for number in range(12):
        (tree / "a" / f"up{number}").symlink_to(tree)
        (tree / f"self{number}").symlink_to(".")
        (tree / f"broken{number}").symlink_to(f"broken{number}")
    assert names(tree, "**/*.md") == ["a/deep/y.md"]
    assert names(tree, "self3/a/z.txt", "a/up*/a/z.txt", "self*/a/z.txt") == ["self3/a/z.txt"]


@pytest.mark.parametrize("entry", [".", "**/*.md", "a/*/y.md", "a/deep/*.md"])
def test_a_folder_that_cannot_be_read_is_named(
    tree: Path, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def denied(folder: Path) -> list[str]:
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(PermissionError, match="a/deep"):
        find_files(tree, [entry])


def test_links_count_once_and_loops_end(tree: Path) -> None:
    (tree / "a" / "up").symlink_to(tree)
    (tree / "c.txt").symlink_to("b.txt")
    (tree / "broken.txt").symlink_to("nothing")
    assert names(tree, ".").count("b.txt") == 1
    assert "c.txt" not in names(tree, ".")
    assert sorted(names(tree, "**/*.txt")) == [
        "[odd].txt",
        "a-b/x.txt",
        "a.txt",
        "a/z.txt",
        "b.txt",
    ]
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
