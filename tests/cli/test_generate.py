"""`mblm generate`: the bytes it writes where, and what it refuses in one line."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mblm import MBLM
from mblm.cli import main
from mblm.constrain import Regex
from tests.cli.program import COUNT, ENVIRONMENT, Run, command, expected
from tests.models import model, transformer

# -- generate: the bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, arguments",
    [
        ([], {}),
        (["--temperature", "0.3"], {"temperature": 0.3}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--top-k", "7", "--min-p", "0.1"], {"top_k": 7, "min_p": 0.1}),
        (["--draft", "ngram"], {"draft": "ngram"}),
        (["--regex", "[à-ÿ]+"], {"constraint": Regex("[à-ÿ]+")}),
        # The same as Python has it where the locale is not UTF-8.
        (["--regex", "[\udcc3\udca0-\udcc3\udcbf]+"], {"constraint": Regex("[à-ÿ]+")}),
        (["--filter-thres", "0"], {"filter_thres": 0}),
        (["--filter-thres", "1"], {"filter_thres": 1}),
        (["--device", "cpu"], {}),
        (["--bytes", "0"], {"num_tokens_to_generate": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_writes_the_bytes_of_generate(
    run: Run, saved: Path, bytes_model: MBLM, flags: list[str], arguments: dict[str, object]
) -> None:
    result = run("generate", saved, "--prompt", "ab", "--seed", 1, "--bytes", COUNT, *flags)
    assert (result.status, result.out) == (0, expected(bytes_model, b"ab", **arguments))
    assert "bytes/s" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_weights_are_read_as_asked(
    run: Run, saved: Path, bytes_model: MBLM, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    arguments = ["generate", saved, "--seed", 1, "--bytes", COUNT]
    if weights != "float32":  # the default
        arguments += ["--weights", weights]
    whole = expected(bytes_model, weights=weights)
    asked, generate = [], MBLM.generate

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["weights"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(MBLM, "generate", spy)
    assert run(*arguments).out == whole
    assert asked == [weights]


def test_a_model_saved_in_bfloat16_is_run_in_float32(
    run: Run, bytes_model: MBLM, tmp_path: Path
) -> None:
    rounded = copy.deepcopy(bytes_model).bfloat16()
    rounded.save_pretrained(tmp_path / "rounded")
    out = run("generate", tmp_path / "rounded", "--seed", 1, "--bytes", COUNT).out
    assert out == expected(rounded.float())


def test_stops_after_any_stop_text(run: Run, saved: Path) -> None:
    arguments = ["generate", saved, "--seed", 1, "--bytes", 40, "--temperature", 1e-6]
    whole = run(*arguments).out.decode("latin-1")
    ascii_run = next(c for c in whole if c.isascii() and c.isprintable() and c != "-")
    result = run(*arguments, "--stop", "not to be found", "--stop", ascii_run)
    assert result.out.decode("latin-1") == whole[: whole.index(ascii_run) + 1]


def test_writes_json_that_a_schema_describes(run: Run, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    properties = {"a": {"type": "integer", "minimum": 10, "maximum": 99}}
    only = {"type": "object", "required": ["a"], "additionalProperties": False}
    schema.write_text(json.dumps({"properties": properties, **only}))
    result = run("generate", saved, "--json-schema", schema, "--seed", 1)
    assert 10 <= json.loads(result.out)["a"] <= 99
    schema.write_bytes(b"\xff{")
    assert f"--json-schema: {schema}: " in run("generate", saved, "--json-schema", schema).error


def test_without_a_seed_draws_one_and_tells_it(run: Run, saved: Path) -> None:
    first, second = (run("generate", saved, "--bytes", 64) for _ in range(2))
    assert first.out != second.out
    seed = first.err.split()[-1]
    assert run("generate", saved, "--bytes", 64, "--seed", seed).out == first.out


@pytest.mark.parametrize("prompt", [b"", b"a", b"\xff\x00\n" * 9], ids=["empty", "one", "binary"])
def test_prompt_from_a_file_or_standard_input(
    run: Run,
    saved: Path,
    bytes_model: MBLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: bytes,
) -> None:
    (tmp_path / "prompt").write_bytes(prompt)
    arguments = ["generate", saved, "--seed", 1, "--bytes", COUNT, "--prompt-file"]
    assert run(*arguments, tmp_path / "prompt").out == expected(bytes_model, prompt)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    assert run(*arguments, "-").out == expected(bytes_model, prompt)


def test_prompt_is_utf8(run: Run, saved: Path, bytes_model: MBLM) -> None:
    result = run("generate", saved, "--prompt", "aé", "--seed", 1, "--bytes", COUNT)
    assert result.out == expected(bytes_model, "aé".encode())


def test_out_is_written_and_replaced(
    run: Run, saved: Path, bytes_model: MBLM, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"before" * 100)
    for count in (COUNT, 0):
        result = run("generate", saved, "--seed", 1, "--bytes", count, "--out", out)
        assert (result.status, result.out) == (0, b"")
        assert out.read_bytes() == expected(bytes_model, num_tokens_to_generate=count)


def test_checkpoint_of_a_training_run(
    run: Run, run_folder: Path, bytes_model: MBLM, tmp_path: Path
) -> None:
    arguments = ["generate", run_folder / "model_top1.pth", "--seed", 1, "--bytes", COUNT]
    assert run(*arguments).out == expected(bytes_model)
    elsewhere = (run_folder / "config.yaml").rename(tmp_path / "other.yml")
    assert "config.yaml, which says what model it is" in run(*arguments).error
    assert run(*arguments, "--config", elsewhere).out == expected(bytes_model)


def test_a_terminal_shows_text(
    run: Run, saved: Path, bytes_model: MBLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty")
    terminal, child = pty.openpty()
    with open(child, "w", encoding="utf-8") as opened:
        monkeypatch.setattr(sys, "stdout", opened)
        monkeypatch.setattr(sys, "stderr", opened)
        assert run("generate", saved, "--seed", 1, "--bytes", 60).status == 0
    shown = b""
    while chunk := _read_terminal(terminal):
        shown += chunk
    os.close(terminal)
    text = expected(bytes_model, num_tokens_to_generate=60).decode(errors="replace")
    assert "\ufffd" in text
    # Terminals write "\n" as "\r\n".
    assert shown.decode().startswith(text.replace("\n", "\r\n") + "\r\n60 bytes in")


def _read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_a_reader_that_leaves_is_no_error(saved: Path) -> None:
    arguments = command("generate", saved, "--bytes", 100_000)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_an_interrupt_ends_quietly(saved: Path) -> None:
    arguments = command("generate", saved, "--bytes", 1_000_000)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 130


# -- generate: what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "-1"], "--temperature: expected"),
        (["--top-k", "0"], "--top-k: expected a number >= 1, got 0"),
        (["--draft", "x"], "--draft: expected 'ngram', an mblm.MBLM or None, got 'x'"),
        (["--regex", "("], "--regex: no regular expression: "),
        (["--regex", ""], "--regex: only the empty string satisfies ''"),
        (["--json-schema", "nowhere.json"], "nowhere.json: No such file"),
        (["--top-p", "3"], "--top-p: expected a number in (0, 1], got 3.0"),
        (["--stop", ""], "--stop: expected"),
        (["--seed", str(2**64)], "--seed: expected an integer"),
        (["--weights", "int4"], "--weights: expected one of float32, bfloat16, int8, got 'int4'"),
        (["--device", "abacus"], "--device: abacus cannot be used"),
        (["--device", "meta"], "--device: meta cannot be used"),
        (["--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["--prompt-file", "."], ".: Is a directory"),
        (["--config", "some.yaml"], "no .pth file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(
    run: Run, saved: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"kept")
    result = run("generate", saved, "--out", out, *flags)
    assert result.status == 1 and message in result.error
    assert out.read_bytes() == b"kept"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "MODEL"),
        (["generate", "x", "--bytes", "-1"], "--bytes"),
        (["generate", "x", "--prompt", "a", "--prompt-file", "b"], "at most one of --prompt"),
        (["generate", "x", "--prompts", "b"], "--prompts needs --out"),
        (["generate", "x", "--regex", "a", "--json-schema", "b"], "at most one of --regex"),
        (["generate", "x", "--colour"], "--colour"),
        (["teleport"], "teleport"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.status == 2 and message in result.error


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model with a context of 16 bytes, in a folder."""
    model(transformer(), seq_lens=[4, 4], num_tokens=100).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def test_ids_outside_the_vocabulary_and_beyond_the_context(run: Run, narrow: Path) -> None:
    arguments = ["generate", narrow]
    assert "token id 122 at position (1,)" in run(*arguments, "--prompt", "az").error
    assert "17 bytes exceed the context of 16 bytes" in run(*arguments, "--prompt", "a" * 17).error
    (narrow / "prompt").write_bytes(b"a" * 17)
    assert "--prompt-file: 17 bytes" in run(*arguments, "--prompt-file", narrow / "prompt").error
    error = run(*arguments, "--bytes", 14, "--prompt", "abc").error
    assert "--bytes: 14 bytes after a prompt of 3 exceed the context of 16 bytes" in error


@pytest.mark.parametrize("prompt", ["", "abc", "a" * 16])
def test_writes_what_the_context_holds(run: Run, narrow: Path, prompt: str) -> None:
    result = run("generate", narrow, "--prompt", prompt)
    count = 16 - len(prompt)
    assert len(result.out) == count
    assert result.err.startswith(f"{count} bytes in ")
    filled = "which fill" if count else "as the prompt fills"
    assert f", {filled} the context of 16, " in result.err


def test_tells_how_many_bytes_were_written(run: Run, tmp_path: Path) -> None:
    special = model(transformer(pos_emb_type=None), seq_lens=[4, 4], num_tokens=257)
    special.to_logits.bias.data[250] = special.to_logits.bias.data[256] = 99  # a byte, and none
    special.save_pretrained(tmp_path / "m")
    result = run("generate", tmp_path / "m", "--bytes", 40)
    assert 0 < len(result.out) < 40
    assert result.err.startswith(f"{len(result.out)} bytes in ")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_folder(run: Run, saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:-20])
    assert name in run("generate", saved).error
    (saved / name).unlink()
    assert name in run("generate", saved).error


def test_out_never_replaces_what_is_read(run: Run, saved: Path, run_folder: Path) -> None:
    prompt = saved.parent / "prompt"
    prompt.write_bytes(b"a")
    checkpoint = run_folder / "model_top1.pth"
    for arguments in (
        [saved, "--out", saved / "model.safetensors"],
        [saved, "--out", saved / "config.json"],
        [saved, "--prompt-file", prompt, "--out", prompt],
        [checkpoint, "--out", checkpoint],
        [checkpoint, "--out", run_folder / "config.yaml"],
    ):
        before = Path(arguments[-1]).read_bytes()
        assert "would be lost" in run("generate", *arguments).error
        assert Path(arguments[-1]).read_bytes() == before


def test_out_must_be_a_file_in_a_folder(run: Run, saved: Path) -> None:
    for out in (saved, saved / "absent" / "out"):
        assert "--out" in run("generate", saved, "--out", out).error


def test_a_bug_shows_its_traceback(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(MBLM, "generate", broken)
    monkeypatch.setattr(sys, "argv", ["mblm", "generate", str(saved)])
    with pytest.raises(KeyError, match="a bug") as bug:
        main()
    sys.excepthook(bug.type, bug.value, bug.tb)  # as Python calls it
    # Python's own, before which PyTorch puts the rank where there has been a process group.
    assert "Traceback (most recent call last):\n" in capsys.readouterr().err
