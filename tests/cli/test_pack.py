"""`mblm pack` as its users see it."""

import json
from pathlib import Path

from tests.cli.program import Run


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"body": f"post {n}"}) + "\n" for n in range(count)))
    return path


def test_it_tells_what_it_has_packed(tmp_path: Path, run: Run) -> None:
    posts = write(tmp_path / "posts.jsonl", 1000)
    posts.write_text('{"body": ""}\n' + posts.read_text())
    done = run("pack", posts, "--field", "body", "--valid", "0.1", "--out", tmp_path / "packed")
    assert (done.status, done.err) == (0, "")
    assert done.out.decode().splitlines() == [
        f"Packed into {tmp_path / 'packed'}",
        "train: 900 documents, 7,101 bytes",
        "valid: 100 documents, 789 bytes",
        "left out: 1 empty",
        f"Next: set io.dataset_dir to {tmp_path / 'packed'}",
    ]


def test_an_error_is_one_line(tmp_path: Path, run: Run) -> None:
    posts = write(tmp_path / "posts.jsonl", 3)
    done = run("pack", posts, "--out", tmp_path / "packed")
    assert done.status == 1
    assert done.error == f"mblm: error: {posts}, row 1: no field 'text', only 'body'\n"
    assert run("pack", tmp_path / "nothing", "--out", tmp_path / "packed").status == 1
    assert not (tmp_path / "packed").exists()


def test_it_needs_sources_and_a_folder(tmp_path: Path, run: Run) -> None:
    assert run("pack", "--out", tmp_path / "packed").status == 2
    assert run("pack", tmp_path).status == 2
