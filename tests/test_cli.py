"""The command line: what it writes where, its exit status, and its one-line errors."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import mblm
from mblm import MBLM
from mblm.cli import main
from mblm.train.evaluate import evaluate
from mblm.utils.io import save_model_state
from tests.models import model, transformer

COUNT = 12  # bytes that a test generates


class Result(NamedTuple):
    status: int
    out: bytes
    err: str

    @property
    def error(self) -> str:
        """The error, which is one line, and all there is."""
        assert self.out == b""
        assert self.err.startswith("mblm: error: ") and self.err.count("\n") == 1, self.err
        return self.err


Run = Callable[..., Result]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `mblm` in this process."""

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mblm", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfdbinary.readouterr()
        return Result(stopped.value.code or 0, out, err.decode())

    return call


@pytest.fixture(scope="module")
def bytes_model() -> MBLM:
    torch.manual_seed(0)
    block = transformer(pos_emb_type=None)
    return model(block, seq_lens=[8, 4], num_tokens=257, num_layers=[1, 1])


@pytest.fixture
def saved(bytes_model: MBLM, tmp_path: Path) -> Path:
    """The model in a folder."""
    bytes_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def run_folder(bytes_model: MBLM, tmp_path: Path) -> Path:
    """The model as a training run leaves it: ``.pth`` and ``config.yaml``."""
    folder = tmp_path / "run"
    save_model_state(folder, "model_top0", bytes_model, 1.5)
    params = {**bytes_model.config.model_dump(), "input_seq_len": 32}
    config = {"params": params, "train": {"batch_size": 1}, "io": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def expected(model: MBLM, prompt: bytes = b"", **arguments: object) -> bytes:
    """What `MBLM.generate` gives after the prompt."""
    prime = torch.tensor(list(prompt), dtype=torch.long)
    arguments = {"filter_thres": 0.9, "seed": 1, "num_tokens_to_generate": COUNT} | arguments
    ids = model.generate(prime, enable_progress=False, **arguments)
    return bytes(i for i in ids[len(prompt) :].tolist() if i < 256)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mblm", *map(str, args)]


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(mblm.__file__).parents[1]),
    "PYTHONWARNINGS": "ignore",
}


# -- generate: the bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, arguments",
    [
        ([], {}),
        (["--temperature", "0.3"], {"temperature": 0.3}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
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


def test_stops_after_any_stop_text(run: Run, saved: Path) -> None:
    arguments = ["generate", saved, "--seed", 1, "--bytes", 40, "--temperature", 1e-6]
    whole = run(*arguments).out.decode("latin-1")
    ascii_run = next(c for c in whole if c.isascii() and c.isprintable() and c != "-")
    result = run(*arguments, "--stop", "not to be found", "--stop", ascii_run)
    assert result.out.decode("latin-1") == whole[: whole.index(ascii_run) + 1]


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
    arguments = ["generate", run_folder / "model_top0.pth", "--seed", 1, "--bytes", COUNT]
    assert run(*arguments).out == expected(bytes_model)
    elsewhere = (run_folder / "config.yaml").rename(tmp_path / "other.yml")
    assert "config.yaml" in run(*arguments).error
    assert run(*arguments, "--config", elsewhere).out == expected(bytes_model)


def test_a_terminal_shows_text(saved: Path, bytes_model: MBLM) -> None:
    pty = pytest.importorskip("pty")
    terminal, child = pty.openpty()
    arguments = ["generate", saved, "--seed", 1, "--bytes", 60]
    with subprocess.Popen(command(*arguments), stdout=child, stderr=child, env=ENVIRONMENT) as done:
        os.close(child)
        shown = b""
        while chunk := _read_terminal(terminal):
            shown += chunk
    os.close(terminal)
    assert done.returncode == 0
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
        (["--temperature", "0"], "temperature: expected a finite number > 0, got 0.0"),
        (["--temperature", "nan"], "temperature"),
        (["--filter-thres", "1.5"], "filter_thres: expected a number in [0, 1], got 1.5"),
        (["--top-p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--stop", ""], "stop"),
        (["--weights", "int4"], "weights: expected one of float32, bfloat16, int8, got 'int4'"),
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
        (["generate"], "checkpoint"),
        (["generate", "x", "--bytes", "-1"], "--bytes"),
        (["generate", "x", "--bytes", "many"], "--bytes"),
        (["generate", "x", "--prompt", "a", "--prompt-file", "b"], "at most one of --prompt"),
        (["generate", "x", "--colour"], "--colour"),
        (["teleport"], "teleport"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.status == 2 and message in result.error


def test_ids_outside_the_vocabulary_and_beyond_the_context(run: Run, tmp_path: Path) -> None:
    model(transformer(), seq_lens=[4, 4], num_tokens=100).save_pretrained(tmp_path / "m")
    arguments = ["generate", tmp_path / "m"]
    assert "token id 122 at position (1,)" in run(*arguments, "--prompt", "az").error
    assert "17 bytes exceed the context of 16 bytes" in run(*arguments, "--prompt", "a" * 17).error
    assert "exceed the context of 16 bytes" in run(*arguments, "--bytes", 17).error


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_folder(run: Run, saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:-20])
    assert name in run("generate", saved).error
    (saved / name).unlink()
    assert name in run("generate", saved).error


def test_unknown_field_of_a_folder(run: Run, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "colour": 1}))
    error = run("generate", saved).error
    assert "config.json" in error and "colour" in error and "errors.pydantic.dev" not in error


@pytest.mark.parametrize(
    "config, message",
    [
        ("params: [", "invalid YAML"),
        ("train: {}", "params"),
        ("params: {num_tokens: 3, colour: 1}", "colour"),
    ],
    ids=["no YAML", "no params", "unknown and missing fields"],
)
def test_bad_config_of_a_training_run(
    run: Run, run_folder: Path, config: str, message: str
) -> None:
    (run_folder / "config.yaml").write_text(config)
    error = run("generate", run_folder / "model_top0.pth").error
    assert "config.yaml" in error and message in error


def test_bad_weights_of_a_training_run(run: Run, run_folder: Path) -> None:
    file = run_folder / "model_top0.pth"
    save_model_state(run_folder, "model_top0", model(transformer(), seq_lens=[2, 2]), 1.0)
    assert "does not fit MBLM" in run("generate", file).error
    file.write_bytes(b"not a checkpoint")
    assert "cannot be read as a checkpoint" in run("generate", file).error
    file.unlink()
    assert "model_top0.pth: no such file" in run("generate", file).error


def test_no_such_checkpoint(run: Run, tmp_path: Path) -> None:
    assert "neither a folder nor a model id" in run("generate", tmp_path / "absent").error


def test_out_never_replaces_what_is_read(run: Run, saved: Path, run_folder: Path) -> None:
    prompt = saved.parent / "prompt"
    prompt.write_bytes(b"a")
    checkpoint = run_folder / "model_top0.pth"
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
    with pytest.raises(KeyError, match="a bug"):
        main()


# -- eval, plot and overview -----------------------------------------------------------------------


def test_eval(run: Run, saved: Path, bytes_model: MBLM, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"abc" * 9)
    files[1].write_bytes(b"xyz" * 3)
    scores = evaluate(bytes_model, files, length=8)
    facts = json.loads(run("eval", saved, *files, "--length", 8, "--json").out)
    assert [row["file"] for row in facts["files"]] == [str(file) for file in files]
    bits = [score.bits_per_byte for score in scores]
    assert [row["bits_per_byte"] for row in facts["files"]] == pytest.approx(bits)
    assert facts["bytes"] == 36
    assert facts["bits_per_byte"] == pytest.approx((27 * bits[0] + 9 * bits[1]) / 36)

    table = run("eval", saved, *files, "--length", 8, "--batch-size", 2).out.decode()
    assert table.splitlines()[-1].split() == ["in", "all", "36", f"{facts['bits_per_byte']:.4f}"]


def test_eval_of_no_bytes(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert run("eval", saved, tmp_path / "empty").out.split()[-2:] == [b"0", b"-"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "SAVED", "absent.txt"], "absent.txt: No such file"),
        (["eval", "absent", "absent.txt"], "neither a folder nor a model id"),
        (["eval", "SAVED", "FILE", "--length", -1], "at least 1"),
        (["eval", "SAVED", "FILE", "--batch-size", 0], "at least 1"),
        (["plot", "absent.csv"], "absent.csv: No such file"),
        (["plot", "FILE"], "not a run's losses"),
        (["overview", "absent.yaml"], "absent.yaml"),
        (["overview", "FILE"], "not a YAML file"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "FILE"], "not a YAML file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_files_are_one_line(
    run: Run, saved: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    given = {"SAVED": saved, "FILE": tmp_path / "file"}
    result = run(*(given.get(word, word) for word in arguments))
    assert result.status == 1 and message in result.error


def test_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "loss.csv").write_text(
        "gpu_rank,elements_seen,kind,loss,lr\n0,10,train,2,0.1\n0,10,valid,1,-1\n"
    )
    result = run("plot", tmp_path, "--out", tmp_path / "curves.png")
    assert result == (0, b"", "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "svgz2" in run("plot", tmp_path, "--out", tmp_path / "curves.svgz2").error


def test_overview(run: Run, run_folder: Path, bytes_model: MBLM) -> None:
    file = run_folder / "config.yaml"
    text = run("overview", file, file).out.decode()
    count = sum(p.numel() for p in bytes_model.parameters())
    assert text.count(f"{file}: {count:,} parameters, a context of 32 bytes") == 2


# -- The other commands ----------------------------------------------------------------------------


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.decode() == f"mblm {mblm.__version__}\n"
    assert run().out == run("--help").out
    for name in ("generate", "train", "eval", "plot", "overview", "info", "demo"):
        assert f"\n  {name} ".encode() in run("--help").out
        assert run(name, "--help").out.startswith(f"Usage: mblm {name}".encode())


def test_info(run: Run) -> None:
    text = run("info").out.decode()
    facts = json.loads(run("info", "--json").out)
    assert facts["mblm"] == mblm.__version__
    assert facts["native kernels"]["loaded"] == mblm.build_info()["loaded"]
    assert facts["missing"] == mblm.build_info()["missing"]
    assert facts["packages"]["Pillow"] is None or facts["packages"]["Pillow"] in text
    for fact in (mblm.__version__, facts["python"], str(torch.__version__), *facts["missing"]):
        assert fact in text
