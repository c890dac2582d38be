"""What README.md, docs/ and the log show is true: code runs, links lead somewhere, names exist.

A comment before a code block says how it is run: ``<!-- continues -->`` in the namespace of the
Python block before it, ``<!-- not run: why -->`` not at all.
"""

import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import mblm
from mblm import MBLMModelConfig
from mblm.model.config import block_registry
from mblm.train.core.config import CoreTrainConfig
from tests.cli.program import Run
from tests.models import mamba, model, transformer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "mblm" / "models").glob("*/*.md")),
    ROOT / "dev" / "LOG.md",
]
BLOCK = re.compile(
    r"^(?:<!-- (?:(?P<continues>continues)|not run: (?P<not_run>[^\n]+)) -->\n)?"
    r"```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


@dataclass
class Block:
    """A code block of a document."""

    name: str  # file and line
    language: str
    code: str  # preceded by empty lines, so that a traceback gives the document's lines
    continues: bool
    not_run: str | None


def blocks_of(document: Path) -> list[Block]:
    """The code blocks of a document, each Python block together with those it continues."""
    text = document.read_text(encoding="utf-8")
    found: list[Block] = []
    python = ""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        code = match["code"]
        if match["language"] == "python" and not match["not_run"]:
            so_far = python if match["continues"] else ""
            python = code = so_far + "\n" * (line - so_far.count("\n")) + code
        name = f"{document.name}:{line + 1}"
        found.append(
            Block(name, match["language"], code, bool(match["continues"]), match["not_run"])
        )
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def those(language: str) -> list[object]:
    chosen = [block for block in BLOCKS if block.language == language]
    return [pytest.param(block, id=block.name) for block in chosen]


def last_of_each_chain() -> list[object]:
    """Python blocks that no other continues; the others run as a part of these."""
    python = [block for block in BLOCKS if block.language == "python" and not block.not_run]
    followers = [*python[1:], None]
    pairs = zip(python, followers, strict=True)
    last = [block for block, follower in pairs if follower is None or not follower.continues]
    return [pytest.param(block, id=block.name) for block in last]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documents speak of, and a program `mblm` for what needs a shell."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    small = model(
        mamba("mamba1"), transformer(), seq_lens=[512, 4], num_tokens=257, hidden_dims=[8, 8]
    )
    small.save_pretrained(folder / "my-model")
    (folder / "prompt.txt").write_text("The first line\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "The first line"}\n{"prompt_base64": "/w=="}')
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "any.txt").write_text("The cat sat on the mat.\n" * 1000)
    posts = (json.dumps({"text": f"Post {n}: " + "the cat sat. " * 9}) for n in range(400))
    (folder / "posts.jsonl.gz").write_bytes(gzip.compress("\n".join(posts).encode()))
    for name in ("configs", "mblm", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    program = folder / "bin" / "mblm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mblm "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def in_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    # Blocks that a document registers are gone after it.
    monkeypatch.setattr(block_registry, "_blocks", dict(block_registry._blocks))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_code_block_is_looked_at(document: Path) -> None:
    blocks = blocks_of(document)
    fences = [line for line in document.read_text().splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks)
    assert {block.language for block in blocks} <= {"python", "sh", "yaml"}
    assert all(not block.continues or block.language == "python" for block in blocks)


@pytest.mark.parametrize("block", last_of_each_chain())
@pytest.mark.usefixtures("in_files")
def test_python(block: Block) -> None:
    exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", those("yaml"))
def test_yaml(block: Block) -> None:
    """A model configuration, alone or as ``params`` of an experiment's, or fields of ``train``."""
    fields = yaml.safe_load(block.code)
    if fields.keys() == {"train"}:
        batch = {"batch_size": 1, "gradient_accumulate_every": 1}
        target = {"target_elements": 1, "target_elements_strategy": "batch"}
        CoreTrainConfig(**fields["train"], **batch, **target)
        return
    fields = fields.get("params", fields)
    fields.pop("input_seq_len", None)
    MBLMModelConfig.model_validate(fields)


@pytest.mark.parametrize("block", those("sh"))
@pytest.mark.usefixtures("in_files")
def test_shell(block: Block, files: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `mblm` is told to do works; what prepares an environment is there to be asked for."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command = [word for word in words if not SETTING.match(word)]
        if not command:
            continue
        if command[0] != "mblm":
            CHECKS[command[0]](command[1:])
        elif block.not_run:
            continue
        elif not all(part.split()[0] == "mblm" for part in line.split(" | ")):
            run_in_a_shell(line, files)
        else:
            data = b""
            for part in line.split(" | "):  # as a shell would run it, without another process
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
                name, *others = shlex.split(part, comments=True)[1:]
                found = (sorted(glob.glob(word)) if "*" in word else [word] for word in others)
                shorter = SHORTER if name == "train" else []
                done = run(name, *itertools.chain(*found), *shorter)
                assert done.status == 0, done.err
                data = done.out


# A training run takes a minute or more: it is cut short.
SHORTER = ["--set", "train.target_elements=4000", "--set", "train.max_eval_steps=2"]


def run_in_a_shell(line: str, files: Path) -> None:
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", line],
        env={
            **os.environ,
            "PATH": f"{files / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def check_make(words: list[str]) -> None:
    targets = [word for word in words if not SETTING.match(word)]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def check_install(words: list[str]) -> None:
    """The extras that are asked for exist."""
    table = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    for word in words[words.index("install") + 1 :]:
        name, _, extras = word.rstrip("]").partition("[")
        for extra in extras.split(",") if extras else ():
            assert name == "." and re.search(rf"^{extra} = \[", table, re.MULTILINE), word


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_module(words[1]), words[1]
    else:
        assert words[0].endswith(".py") and (ROOT / words[0]).is_file(), words[0]


def check_torchrun(words: list[str]) -> None:
    """A module that is named exists; a file is one that the reader has written."""
    if "-m" in words:
        assert find_module(words[words.index("-m") + 1])


def check_bash(words: list[str]) -> None:
    script = next(word for word in words if word.endswith(".sh"))
    assert (ROOT / script).is_file(), script


SETTING = re.compile(r"[A-Z_]+=")  # of a variable
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CHECKS = {
    "make": check_make,
    "pip": check_install,
    "python": check_python,
    "torchrun": check_torchrun,
    "bash": check_bash,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for link, anchor in LINK.findall(document.read_text()):
        if "://" not in link:
            target = document.parent / link if link else document
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), f"{link}#{anchor}"


def anchors_of(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_benchmarks_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"benchmarks/\w+\.py", document.read_text())
    assert [file for file in named if not (ROOT / file).is_file()] == []


def resolve(path: str) -> object:
    """What a dotted path names."""
    parts = path.split(".")
    count = len(parts)
    while count > 1 and not find_module(".".join(parts[:count])):
        count -= 1
    found: object = importlib.import_module(".".join(parts[:count]))
    for attribute in parts[count:]:
        found = getattr(found, attribute)
    return found


def find_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def test_the_api_page_names_what_exists_and_all_that_is_public() -> None:
    listed = re.findall(r"`(mblm\.[\w.]+)`", (ROOT / "docs" / "api.md").read_text())
    for path in listed:
        resolve(path)
    assert {f"mblm.{name}" for name in mblm.__all__} <= set(listed)


def compatible_modules() -> list[tuple[str, list[str]]]:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    table = text.partition("## What is a drop-in")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", table, re.MULTILINE)
    return [(module, re.findall(r"`(\w+)`", names)) for module, names in rows]


def test_the_compatibility_page_names_what_exists() -> None:
    modules = compatible_modules()
    assert len(modules) > 10
    missing = [
        f"{module}.{name}"
        for module, names in modules
        for name in names
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing
