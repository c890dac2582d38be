"""The models that come with the package: small, as good as their cards say, the same everywhere."""

import html
import re
import runpy
import sysconfig
from pathlib import Path

import pytest
import torch

from mblm import MBLM
from mblm.model.find import packaged_models
from tests.cli.program import Run
from tests.decoding import in_pytorch

ROOT = Path(__file__).parents[1]
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def python() -> MBLM:
    return MBLM.from_pretrained("python", dtype=torch.float32)


@pytest.mark.parametrize("folder", packaged_models(), ids=lambda folder: folder.name)
def test_it_is_small_and_has_a_card(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * 2**20
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert MBLM.from_pretrained(folder.name).dtype == torch.bfloat16


def test_there_is_one_of_python() -> None:
    assert [folder.name for folder in packaged_models()] == ["python"]


def test_a_file_that_was_held_out_costs_what_the_card_says(python: MBLM) -> None:
    name = "email/contentmanager.py"
    card = (packaged_models()[0] / "README.md").read_text()
    said = re.search(rf"^\| `{name}` \| ([\d,]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert said is not None
    text = (STDLIB / name).read_bytes()
    # Other releases of Python have changed a few lines.
    tolerance = 0.002 if len(text) == int(said[1].replace(",", "")) else 0.05
    assert python.score(text).bits_per_byte == pytest.approx(float(said[2]), abs=tolerance)


def test_compiled_code_and_pytorch_write_the_same(python: MBLM) -> None:
    prompt = "class Reader:\n    def "
    wishes = {"num_tokens_to_generate": 60, "temperature": 0.0, "enable_progress": False}
    written = python.generate(prompt, **wishes)
    with in_pytorch():
        assert torch.equal(python.generate(prompt, **wishes), written)


def test_the_card_is_what_the_script_writes() -> None:
    """All but what was measured."""
    template = (ROOT / "scripts" / "python_model_card.md").read_text()
    card = (packaged_models()[0] / "README.md").read_text()
    for line in template.splitlines():
        pattern = re.sub(r"\\\{[^{}]*\\\}", "(.|\n)*", re.escape(line))
        assert re.search(pattern, card), line


def test_models_lists_them(run: Run) -> None:
    told = run("models").out.decode().splitlines()
    (folder,) = packaged_models()
    assert told[0] == "python" and told[-1] == f"  {folder}"
    assert "Writes programs in Python" in told[1]


def test_generate_writes_with_it(run: Run) -> None:
    done = run("generate", "python", "--prompt", "def ", "--bytes", 20, "--seed", 1)
    assert (done.status, len(done.out)) == (0, 20)


def test_the_files_that_it_is_trained_and_scored_on_are_apart() -> None:
    config = runpy.run_path(str(ROOT / "scripts" / "train_python_model.py"))["experiment"]()
    parts = [set(config.io.dataset_args[f"{part}files"]) for part in ("", "valid_", "test_")]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))


def test_the_terminal_of_the_readme_shows_what_was_written() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "record_terminal.py"))
    recorded = (ROOT / "docs" / "generate.svg").read_text()
    for picture in (recorded, script["draw"](script["COMMAND"], "a < b", "2 bytes")):
        assert html.escape(f"$ {script['COMMAND']}").replace(" ", "&#160;") in picture
        assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
