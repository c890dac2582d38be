"""The examples do what they say, at tiny settings."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from mblm.model.config import block_registry

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch, capfd):
    """Run an example as a program; returns what it wrote on standard output and error."""
    monkeypatch.setattr(block_registry, "_blocks", dict(block_registry._blocks))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        sys.stdout.flush()
        return capfd.readouterr()

    return run


def test_what_train_plain_has_learned_generate_stream_tells(example, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("abcdefgh" * 8)
    trained = example("train_plain", book, tmp_path / "model", "--steps", 40, "--batch", 2)
    bits = [float(number) for number in re.findall(r"([\d.]+) bits per byte", trained.out)]
    assert bits[-1] < 0.5 < 7 < bits[0]

    told = example("generate_stream", tmp_path / "model", "abcd", "--bytes", 12, "--top-p", 0.1)
    assert told.out.startswith("abcdefghabcdefgh")
    assert re.search(r"12 bytes in [\d.]+ s, \d+ bytes/s", told.err)


def test_custom_block_generates_the_same_with_and_without_the_hook(example):
    without, with_hook = example("custom_block", 16).out.splitlines()
    assert without.startswith("hook: False") and with_hook.startswith("hook: True")
    assert without.partition("first bytes")[2] == with_hook.partition("first bytes")[2] != ""
