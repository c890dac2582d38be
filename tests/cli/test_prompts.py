"""`mblm generate --prompts`: each line has its result, and what is no prompt is named."""

import json
from base64 import b64decode
from pathlib import Path

import pytest

from mblm import MBLM
from tests.cli.program import COUNT, Run, expected
from tests.models import model, transformer


def test_prompts_of_a_file(run: Run, saved: Path, bytes_model: MBLM, tmp_path: Path) -> None:
    """Each line has what `generate` gives for it and its seed."""
    lines = [{"prompt": "ab"}, {"prompt_base64": "/wA="}, {"prompt": ""}]
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--prompts", asked, "--out", out, "--seed", 5, "--bytes", COUNT, "--top-p", 0.9]
    result = run("generate", saved, *flags)
    assert (result.status, result.out) == (0, b"")
    assert "3 prompts" in result.err and result.err.count("\n") == 1
    written = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["index"])
    for number, (line, prompt) in enumerate(zip(written, [b"ab", b"\xff\0", b""], strict=True)):
        assert line.items() >= lines[number].items()
        assert (line["index"], line["seed"], line["finish_reason"]) == (
            number,
            5 + number,
            "length",
        )
        want = expected(bytes_model, prompt, seed=5 + number, top_p=0.9)
        got = line["text"].encode() if "text" in line else b64decode(line["text_base64"])
        assert got == want


def test_no_prompts_of_a_file(run: Run, saved: Path, tmp_path: Path) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text("")
    assert run("generate", saved, "--prompts", asked, "--out", out).status == 0
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    ["x", "3", "[]", "{}", '{"prompt": 3}', '{"text": ""}', '{"prompt_base64": "?"}',
     '{"prompt": "", "n": 1}', '{"prompt": "\\ud800"}', "\xff", "[" * 9999],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(
    run: Run, tmp_path: Path, saved: Path, line: str
) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "a"}\n' + line, encoding="latin-1")
    error = run("generate", saved, "--prompts", asked, "--out", out).error
    assert "asked.jsonl, line 2: expected" in error and not out.exists()


def test_a_prompt_over_the_context_is_named(run: Run, tmp_path: Path) -> None:
    fixed = model(transformer(), seq_lens=[8, 4], num_tokens=257, num_layers=[1, 1])
    fixed.save_pretrained(tmp_path / "fixed")
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text(json.dumps({"prompt": "a" * 33}))
    error = run("generate", tmp_path / "fixed", "--prompts", asked, "--out", out).error
    assert "--prompts[0]: 33 bytes exceed the context of 32" in error
    assert not out.exists()


def test_what_is_wrong_with_one_prompt_names_the_option(run: Run, tmp_path: Path) -> None:
    fixed = model(transformer(), seq_lens=[8, 4], num_tokens=257, num_layers=[1, 1])
    fixed.save_pretrained(tmp_path / "fixed")
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "a"}\n{"prompt": "aa"}')
    flags = ["generate", tmp_path / "fixed", "--prompts", asked, "--out", out]
    for option, value, number in (("--seed", 2**64 - 1, 1), ("--bytes", 31, 1), ("--bytes", 32, 0)):
        error = run(*flags, option, value).error
        assert f"--prompts[{number}]: {option}: " in error
    assert not out.exists()
