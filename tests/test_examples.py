"""The examples do what they say, at tiny settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(example: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{example}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done


def test_what_train_plain_has_learned_generate_stream_tells(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("abcdefgh" * 8)
    trained = run("train_plain", book, tmp_path / "model", "--steps", 40, "--batch", 2)
    bits = [float(number) for number in re.findall(r"([\d.]+) bits per byte", trained.stdout)]
    assert bits[-1] < 0.5 < 7 < bits[0]

    told = run("generate_stream", tmp_path / "model", "abcd", "--bytes", 12, "--top-p", 0.1)
    assert told.stdout.startswith("abcdefghabcdefgh")
    assert re.search(r"12 bytes in [\d.]+ s, \d+ bytes/s", told.stderr)


def test_custom_block_generates_the_same_with_and_without_the_hook() -> None:
    without, with_hook = run("custom_block", 16).stdout.splitlines()
    assert without.startswith("hook: False") and with_hook.startswith("hook: True")
    assert without.partition("first bytes")[2] == with_hook.partition("first bytes")[2] != ""
