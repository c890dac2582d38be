"""Models by their ids on the hub, which stands in here: downloads, and all that may be missing."""

from pathlib import Path
from typing import Any

import pytest

from mblm import MBLM
from mblm.model.find import CONFIG_FILE, INDEX_FILE, SHARDS, WEIGHTS_FILE
from tests.models import mamba, model, transformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    m = model(mamba("mamba1"), transformer(pos_emb_type="rope"), seq_lens=[3, 4])
    m.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_id_is_downloaded(folder: Path, monkeypatch: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        calls.append((repo_id, arguments))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    options = {"revision": "v1", "token": "secret", "cache_dir": folder}
    options |= {"force_download": True, "local_files_only": True}
    MBLM.from_pretrained("someone/some-model", **options)
    files = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, SHARDS]
    assert calls == [("someone/some-model", {"allow_patterns": files, **options})]
    MBLM.from_pretrained(folder, **options)
    assert len(calls) == 1


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_download_that_lacks_a_file_is_named(folder: Path, file: str) -> None:
    """As where another program has asked for one file, and there is no network now."""
    pytest.importorskip("huggingface_hub")
    cache = folder.parent / "models--someone--some-model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / ("a" * 40))
    options: dict[str, Any] = {"cache_dir": folder.parent, "local_files_only": True}
    assert MBLM.from_pretrained("someone/some-model", **options).num_tokens == 19
    (cache / "snapshots" / ("a" * 40) / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"some-model.* holds no {file}"):
        MBLM.from_pretrained("someone/some-model", **options)


@pytest.mark.parametrize("error", [OSError, type("ReadTimeout", (Exception,), {})])
def test_a_hub_that_gives_nothing_is_told_with_the_name(
    monkeypatch: Any, error: type[Exception]
) -> None:
    """Its network library's errors are of classes of their own, often without words."""
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=rf"someone/model is no .*: {error.__name__}"):
        MBLM.from_pretrained("someone/model")


@pytest.mark.parametrize("name", ["a--b/c", "-a/b", "a/b.git"])
def test_an_id_that_the_hub_refuses(name: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match=f"{name} is no folder here"):
        MBLM.from_pretrained(name)


def test_without_the_hub_package_it_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'mblm\[hub\]'"):
        MBLM.from_pretrained("someone/some-model")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "/no/such", "./a/b/c", "Bücher und/ä"])
def test_what_is_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a model id"):
        MBLM.from_pretrained(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"book\.txt is no model: expected a folder or"):
        MBLM.from_pretrained(tmp_path / "book.txt")
