"""The command line: its commands beside `generate`, how it starts and ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import mblm
from mblm import MBLM
from mblm.inference.score_files import score_files
from mblm.model.config import block_registry
from tests import fresh
from tests.cli.program import ENVIRONMENT, Run, command
from tests.models import model, transformer

LOSSES = """\
gpu_rank,elements_seen,kind,loss,lr,timestamp
0,10,train,2,0.1,2026-01-01
0,10,valid,1,-1,2026-01-01
"""

# -- eval, plot and overview -----------------------------------------------------------------------


def test_eval(run: Run, saved: Path, bytes_model: MBLM, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_bytes(b"abc" * 9)
    files[1].write_bytes(b"xyz" * 3)
    scores = score_files(bytes_model, files, length=8, stride=3)
    facts = json.loads(run("eval", saved, *files, "--length", 8, "--stride", 3, "--json").out)
    assert [row["file"] for row in facts["files"]] == [str(file) for file in files]
    bits = [score.bits_per_byte for score in scores]
    assert [row["bits_per_byte"] for row in facts["files"]] == pytest.approx(bits)
    assert facts["bytes"] == 36
    assert facts["bits_per_byte"] == pytest.approx((27 * bits[0] + 9 * bits[1]) / 36)

    assert facts["bytes_per_second"] > 0

    sizes = ["--length", 8, "--stride", 3, "--batch-bytes", 16]
    table = run("eval", saved, *files, *sizes)
    last = table.out.decode().splitlines()[-1].split()
    assert last == ["in", "all", "36", f"{facts['bits_per_byte']:.4f}"]
    assert table.err.endswith(" bytes/s\n")


def test_eval_of_standard_input(
    run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 9)
    with (tmp_path / "f").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        facts = json.loads(run("eval", saved, "-", tmp_path / "f", "--json").out)
    bits = [row["bits_per_byte"] for row in facts["files"]]
    assert facts["bytes"] == 54 and bits[0] == bits[1]


def test_standard_input_is_one_file(run: Run, saved: Path) -> None:
    result = run("eval", saved, "-", "-")
    told = "mblm: error: files: standard input, -, can be read once\n"
    assert (result.status, result.error) == (1, told)


@pytest.mark.parametrize(
    "command", [["eval", "SAVED", "-"], ["generate", "SAVED", "--prompt-file", "-"]]
)
def test_a_standard_input_that_is_closed(
    run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    result = run(*(saved if word == "SAVED" else word for word in command))
    assert (result.status, result.error) == (1, "mblm: error: standard input is closed\n")


def test_a_standard_error_that_is_closed(
    run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    monkeypatch.setattr(sys, "stderr", None)
    assert b"in all" in run("eval", saved, tmp_path / "f").out


def test_eval_of_no_bytes(run: Run, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"empty\xff")
    file.write_bytes(b"")
    assert run("eval", saved, file).out.split()[-2:] == [b"0", b"-"]
    facts = json.loads(run("eval", saved, file, "--json").out)
    assert facts["bytes"] == 0 and facts["bits_per_byte"] is None
    assert facts["files"][0]["file"].endswith("empty\ufffd"), "what any reader of JSON takes"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "SAVED", "absent.txt"], "absent.txt: No such file"),
        (["eval", "absent", "absent.txt"], "neither a folder nor a model id"),
        (["eval", "SAVED", "FILE", "--length", -1], "--length: expected a number from 1, got -1"),
        (["eval", "SAVED", "FILE", "absent.pth"], "absent.pth is a model and no text"),
        (["eval", "SAVED", "."], ".: Is a directory"),
        (["eval", "SAVED", "FILE", "/proc/self/mem"], "/proc/self/mem: Input/output error"),
        (["generate", "SAVED", "--out", "/dev/full"], "/dev/full: No space left on device"),
        (["generate", "SAVED", "--prompts", "JSON", "--out", "/dev/full"], "/dev/full: No space"),
        (["plot", "absent.csv"], "absent.csv: No such file"),
        (["plot", "FILE"], "not a run's losses"),
        (["overview", "FILE"], "not a YAML file"),
        (["train", "FILE"], "not a YAML file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_files_are_one_line(
    run: Run, saved: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "prompts").write_text('{"prompt": "a"}')
    given = {"SAVED": saved, "FILE": tmp_path / "file", "JSON": tmp_path / "prompts"}
    result = run(*(given.get(word, word) for word in arguments))
    assert result.status == 1 and message in result.error


def test_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "loss.csv").write_text(LOSSES)
    result = run("plot", tmp_path, "--out", tmp_path / "curves.png")
    told = f"{tmp_path.name}: at best 1.443 bits per byte, 10 bytes in 0.0 minutes"
    assert result == (0, f"Wrote {tmp_path}/curves.png\n{told}\n".encode(), "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "svgz2" in run("plot", tmp_path, "--out", tmp_path / "curves.svgz2").error


def test_overview(run: Run, run_folder: Path, bytes_model: MBLM) -> None:
    file = run_folder / "config.yaml"
    text = run("overview", file, file).out.decode()
    count = sum(p.numel() for p in bytes_model.parameters())
    assert text.count(f"{file}: {count:,} parameters, a context of 32 bytes") == 2


def test_the_newest_run_is_found_by_every_command(
    run: Run, run_folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"abc")
    (run_folder / "loss.csv").write_text(LOSSES)
    arguments = ["--seed", 1, "--bytes", 20]
    written = run("generate", saved, *arguments).out
    scored = run("eval", saved, "text").out
    for name in (run_folder, f"{tmp_path}/latest", run_folder / "model_top1.pth"):
        assert run("generate", name, *arguments).out == written
        assert run("eval", name, "text").out == scored
        assert run("plot", name).out.startswith(b"Wrote loss.png\nrun: at best")
    assert "latest: no run with *_top*.pth in data/output" in run("generate", "latest").error
    assert "saved: No such file" not in run("plot", saved).error


# -- The other commands ----------------------------------------------------------------------------


def test_modules_of_the_user_register_blocks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(block_registry, "_blocks", dict(block_registry._blocks))
    (tmp_path / "my_blocks_for_a_test.py").write_text(
        "from typing import Literal\n"
        "from mblm import TransformerBlock\n"
        "from mblm.model.config import block_registry\n"
        "@block_registry.register()\n"
        "class MyBlock(TransformerBlock):\n"
        "    block_type: Literal['mine'] = 'mine'\n"
    )
    fields = model(transformer(), seq_lens=[2, 2]).config.model_dump()
    fields["block"]["block_type"] = "mine"
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(fields))
    assert "block" in run("overview", "m.yaml").error
    assert "MyBlock" not in run("config").out.decode()
    assert "no module absent" in run("config", "--import", "absent").error

    imported = ["--import", "my_blocks_for_a_test"]
    assert "1 mine" in run("overview", "m.yaml", *imported).out.decode()
    assert "MyBlock" in json.loads(run("config", *imported).out)["$defs"]
    for name in ("generate", "eval", "train"):
        assert "--import" in run(name, "--help").out.decode()


def test_asking_for_little_takes_little() -> None:
    """Version and help import no torch."""
    code = (
        "import sys, mblm.cli\n"
        "for words in ('--version', '--help', 'generate --help', 'train --help'):\n"
        "    sys.argv = ['mblm', *words.split()]\n"
        "    try: mblm.cli.main()\n"
        "    except SystemExit as ended: assert ended.code == 0, words\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.startswith("mblm ") and "Usage: mblm train" in done.stdout
    assert "mblm.cli.app" in done.stderr.split()
    assert {"torch", "numpy", "mblm.model.config"}.isdisjoint(done.stderr.split())


@pytest.mark.parametrize("where", ["closed", "left", "full"])
def test_a_standard_output_that_takes_nothing(where: str) -> None:
    redirection = {"closed": ">&-", "left": "| true", "full": ">/dev/full"}[where]
    program = shlex.join(command("--help"))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} {redirection}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    error = "mblm: error: [Errno 28] No space left on device\n" if where == "full" else ""
    assert done.stderr == error
    assert done.returncode == 0 if where == "closed" else done.returncode in (0, 1)


def test_no_file_has_the_number_of_a_stream_that_is_closed(tmp_path: Path) -> None:
    """Libraries write to number 2 whatever it is, in a process that is started, too."""
    code = """
import subprocess, sys, mblm.cli, mblm.cli.app
write = "import os; file = open('written', 'ab'); os.write(2, b'a warning'); file.write(b'it')"
def run():
    exec(write, {})
    subprocess.run([sys.executable, "-c", write], check=True)
mblm.cli.app.run = run
mblm.cli.main()
"""
    program = shlex.join([sys.executable, "-c", code])
    subprocess.run(["bash", "-c", f"{program} <&- 2>&-"], env=ENVIRONMENT, cwd=tmp_path, check=True)
    assert (tmp_path / "written").read_bytes() == b"itit"


@pytest.mark.parametrize(
    "words", ["eval SAVED FILE", "generate SAVED --bytes 0", "absent", "eval absent x"]
)
def test_a_standard_error_that_is_full(saved: Path, words: str) -> None:
    """What is told there is lost, and nothing else."""
    told = words.replace("SAVED", str(saved)).replace("FILE", str(saved / "config.json"))
    code = (
        "import os, sys\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "from mblm.cli import main\n"
        "main()"
    )
    done = fresh.run(code, *told.split())
    assert done.returncode == {"absent": 2, "eval absent x": 1}.get(words, 0)


@pytest.mark.parametrize("delay", [0.1, 0.6, 1.4])
def test_an_interrupt_while_starting_is_quiet(saved: Path, delay: float) -> None:
    """Wherever it comes, also while torch is imported, once Python itself has begun."""
    code = "import mblm.cli; print(flush=True); mblm.cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "generate", str(saved), "--bytes", "1000000"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b""
    assert process.returncode == 130


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.decode() == f"mblm {mblm.__version__}\n"
    assert run().out == run("--help").out
    for name in ("generate", "train", "eval", "plot", "overview", "info", "demo", "config"):
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
