"""What a person types for a model or a run: folders, files, the newest."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mblm import MBLM
from mblm.model.find import find_model, find_run
from mblm.utils.io import save_model_state
from tests.models import model, transformer

MODEL = "*_top*.pth"


def make_run(folder: Path, time: int, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in ("config.yaml", *files):
        (folder / file).touch()
    os.utime(folder / "config.yaml", (time, time))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, the newest of which has no model yet."""
    monkeypatch.chdir(tmp_path)
    runs = Path("data", "output")
    make_run(runs / "a_2", 2, "a_top10.pth", "a_top2.pth", "loss.csv")
    make_run(runs / "b_1", 1, "b_top1.pth")
    make_run(runs / "a_3", 3, "loss.csv")
    return runs


@pytest.mark.parametrize("name", ["latest", "data/output/latest", "data/output/a_2"])
def test_a_run_stands_for_its_best_model(runs: Path, name: str) -> None:
    assert find_model(name) == runs / "a_2" / "a_top2.pth"
    os.utime(runs / "b_1" / "config.yaml", (4, 4))
    best = runs / ("b_1/b_top1.pth" if name.endswith("latest") else "a_2/a_top2.pth")
    assert find_model(name) == best


@pytest.mark.parametrize(
    "name",
    [
        "owner/name",
        "absent",
        "data/output/b_1/b_top1.pth",
        "x.pth",
        "data/output/b_1/x",
        "~no user/x",
    ],
)
def test_another_name_is_left_as_it_is(runs: Path, name: str) -> None:
    assert find_model(name) == Path(name)


@pytest.mark.parametrize("name", [None, 3, b"python"])
def test_a_name_is_a_text_or_a_path(name: Any) -> None:
    with pytest.raises(TypeError, match="name: expected a folder, a file or a model's name, got"):
        find_model(name)


def test_an_empty_name_is_not_the_folder_one_is_in(runs: Path) -> None:
    Path("config.json").touch()
    for find in (find_model, partial(find_run, holds=MODEL)):
        with pytest.raises(FileNotFoundError, match="got an empty text"):
            find("")


def test_a_saved_folder_is_a_model_whatever_else_it_holds(runs: Path) -> None:
    for folder in (runs, runs / "a_2"):
        (folder / "config.json").touch()
        assert find_model(folder) == folder


def test_a_folder_called_latest_is_meant_where_there_is_one(runs: Path) -> None:
    (runs / "latest").mkdir()
    assert find_model("data/output/latest") == runs / "latest"


def test_a_folder_with_a_model_comes_before_the_packaged_one_of_its_name(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = Path("packaged", "python")
    packaged.mkdir(parents=True)
    (packaged / "config.json").touch()
    monkeypatch.setattr("mblm.model.find.PACKAGED_MODELS", packaged.parent)
    assert find_model("python") == packaged
    folder = make_run(Path("python"), 1, "a_top1.pth")
    assert find_model("python") == folder / "a_top1.pth"
    (folder / "config.yaml").unlink()  # a folder of anything
    assert find_model("python") == packaged
    assert find_model("./python") == folder
    for file in ("model.safetensors", "config.json"):
        (folder / file).touch()
        assert find_model("python") == folder
        (folder / file).unlink()


def test_says_what_a_run_has_left_that_went_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, "run_left_2.5.pth", "run_left_2.25.pth")
    with pytest.raises(
        FileNotFoundError, match=r"until it validates .*run_left_2\.25\.pth, .*2\.5"
    ):
        find_model(run)


@pytest.mark.parametrize(
    "name, message",
    [
        ("data/output/a_3", "a_3: this run has saved no model yet"),
        ("data/output", "data/output holds runs: name one, or the newest, data/output/latest"),
        ("data/latest", r"data/latest: no run with \*_top\*.pth in data"),
        ("absent/latest", "absent/latest: no run with"),
    ],
)
def test_says_what_is_missing(runs: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        find_model(name)


def test_the_newest_of_the_working_folder_has_a_name(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = runs.absolute() / "latest"
    assert find_model(newest).parent.name == "a_2"
    monkeypatch.chdir(runs)
    with pytest.raises(FileNotFoundError, match=f"or the newest, {newest}"):
        find_model(".")


def test_a_run_is_found_by_any_of_its_files(runs: Path) -> None:
    for name in ("b_1", "b_1/b_top1.pth", "b_1/config.yaml"):
        assert find_run(runs / name, holds=MODEL) == runs / "b_1"
    assert find_run(runs / "b_1" / "loss.csv", holds=MODEL) == runs / "b_1" / "loss.csv"
    assert find_run("latest", holds=MODEL) == runs / "a_2"
    assert find_run("data/output/latest", holds="loss.csv") == runs / "a_3"
    assert find_run("absent", holds=MODEL) == Path("absent")
    with pytest.raises(FileNotFoundError, match="data/output holds runs: name one"):
        find_run("data/output", holds=MODEL)


def test_a_model_is_loaded_from_what_a_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = model(transformer(), seq_lens=[2, 2])
    file = save_model_state("data/output/mine_1", "mine_top1", trained, 1.0)[1]
    params = {**trained.config.model_dump(), "input_seq_len": 4}
    file.with_name("config.yaml").write_text(yaml.safe_dump({"params": params}))
    for name in ("latest", "data/output/latest", file.parent, str(file)):
        loaded = MBLM.from_pretrained(name)
        assert torch.equal(loaded.to_logits.weight, trained.to_logits.weight)
        assert not loaded.training
