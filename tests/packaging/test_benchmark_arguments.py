"""Arguments of the benchmarks: what is wrong is told before anything is measured."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NO_SCRIPTS = "side_by_side", "peer_llama", "gpu_model"
SCRIPTS = sorted({file.stem for file in FOLDER.glob("*.py")} - {*NO_SCRIPTS})


def told(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_and_file_is_checked(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser) -> None:
        made.append(parser)
        parser.exit(2)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    told(script, monkeypatch)
    unchecked = {action.dest for action in made[0]._actions if action.type in (int, Path)}
    assert unchecked <= {"reference", "peer"}, "environments, made or looked for first of all"
    assert all(action.choices for action in made[0]._actions if action.dest == "weights")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("batch --prompts 63", "--prompts: expected 0, or a number >= 64"),
        ("batch --runs 0", "--runs: expected a number >= 1, got 0"),
        ("decode --bytes -1 --threads 1", "--bytes: expected a number >= 1, got -1"),
        ("calls --weights int4", "--weights: invalid choice: 'int4'"),
        ("score --json .", "--json: . is a folder"),
        ("recipes absent.txt", "data: there is no absent.txt"),
    ],
)
def test_says_what_is_wrong(
    words: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(*words.split()[:1], monkeypatch, *words.split()[1:])
    assert error in capsys.readouterr().err
