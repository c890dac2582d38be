"""When compiled kernels are loaded, and what is said when they are not."""

import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mblm.ops import _native
from mblm.ops._reinstall import how_to_compile

RUNNING = str(torch.__version__)
RELEASE = ".".join(RUNNING.split(".")[:2])
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(not CXX, reason="no C++ compiler on this machine")
@pytest.mark.skipif(os.environ.get("MBLM_NATIVE") == "0", reason="MBLM_NATIVE=0 is set")
def test_what_tests_of_compiled_code_need_is_there() -> None:
    assert _native.is_loaded(), _native.build_info()["reason"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder in which nothing was built yet and nothing is loaded."""
    folder = tmp_path / "mblm"
    folder.mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(_native, "PACKAGE", folder)
    monkeypatch.setattr(_native, "_library", None)
    monkeypatch.setattr(_native, "_reason", None)
    monkeypatch.delenv("MBLM_NATIVE", raising=False)
    return folder


def built(package: Path, **record: object) -> None:
    """Lay out what setup.py leaves; the library is no library, so that loading it would fail."""
    (package / "_build.json").write_text(json.dumps(record))
    (package / "_C.so").write_text("not a library")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "none were compiled in "),
        ({"reason": "no C++ compiler was found"}, r"were not compiled: no C\+\+ compiler"),
        ({"torch": "1.0.0"}, f"were compiled for torch 1.0.0, this is torch {RELEASE}"),
        ({"torch": f"{RELEASE}.0a0+git1"}, r"were compiled for torch .*a0\+git1, this is"),
        ({"torch": RUNNING}, r"cannot be loaded \(.*_C.so"),
        ({"torch": f"{RELEASE}.99+cpu"}, r"cannot be loaded \(.*_C.so"),
    ],
    ids=[
        "never-built",
        "pure",
        "another-torch",
        "ahead-of-the-release",
        "broken",
        "of-a-patch-release",
    ],
)
def test_why_kernels_are_not_used(package: Path, record: dict[str, str], reason: str) -> None:
    if record:
        built(package, **record)
    with pytest.warns(RuntimeWarning, match=rf"{reason}.*setup\.py build_ext"):
        _native.load()
    info = _native.build_info()
    assert not info["loaded"] and re.search(reason, info["reason"])
    assert (info["compiled"], info["torch_built"]) == ("torch" in record, record.get("torch"))
    assert any("native kernels" in line and "build_ext" in line for line in info["missing"])


def test_record_without_library(package: Path) -> None:
    built(package, torch=RUNNING, mode="cpu")
    (package / "_C.so").unlink()
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded \(.* holds none for this Python"):
        _native.load()


@pytest.mark.parametrize("torch_built", [RUNNING, "1.0.0"])
def test_require_makes_absence_an_error(
    package: Path, monkeypatch: pytest.MonkeyPatch, torch_built: str
) -> None:
    monkeypatch.setenv("MBLM_NATIVE", "require")
    built(package, torch=torch_built, mode="cpu")
    with pytest.raises(ImportError, match=r"run `python setup\.py"):
        _native.load()


def test_zero_loads_nothing_and_is_silent(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBLM_NATIVE", "0")
    built(package, torch=RUNNING, mode="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native.load()
    assert _native.build_info()["reason"] == "MBLM_NATIVE=0 is set"


@pytest.mark.parametrize("value", ["1", "required", "off"])
def test_other_settings_are_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MBLM_NATIVE", value)
    with pytest.raises(ValueError, match=f"MBLM_NATIVE is '{value}'; expected 0, require"):
        _native.load()


def test_build_info_is_plain_data() -> None:
    info = _native.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["loaded"] == (info["reason"] is None)
    assert info["loaded"] == (info["compiler"] is not None)
    if info["loaded"]:
        assert info["torch_built"] == RUNNING


GIT = {"url": "https://host/mblm", "vcs_info": {"vcs": "git", "commit_id": "abc"}}


@pytest.mark.parametrize(
    ("origin", "installer", "command"),
    [
        ({"url": "file:///a%20b", "dir_info": {}}, "pip", "--no-cache-dir '/a b'"),
        (
            GIT,
            "pip",
            "pip install --no-deps --force-reinstall --no-cache-dir git+https://host/mblm@abc",
        ),
        (GIT, "uv", f"MBLM_TORCH_PYTHON={sys.executable} uv pip install --python {sys.executable}"),
        ({"url": "file:///mblm-1.whl", "archive_info": {}}, "pip", "pip wheel --no-deps"),
        ({"url": "file:///mblm-1.tar.gz", "archive_info": {}}, "pip", "file:///mblm-1.tar.gz`"),
        (None, "pip", "--no-binary mblm mblm==1`"),
    ],
    ids=["folder", "git", "uv", "wheel", "sdist", "index"],
)
def test_what_to_run_fits_how_it_was_installed(
    tmp_path: Path, origin: dict[str, object] | None, installer: str, command: str
) -> None:
    installed(tmp_path, origin, installer)
    assert command in how_to_compile(tmp_path / "mblm")


def test_what_to_run_fits_an_editable_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, environment = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    (source / "setup.py").touch()
    assert "setup.py build_ext --inplace" in how_to_compile(source / "mblm")
    installed(environment, {"url": source.as_uri(), "dir_info": {"editable": True}}, "pip")
    monkeypatch.syspath_prepend(environment)
    assert f"-e {source}`" in how_to_compile(source / "mblm")


def installed(folder: Path, origin: dict[str, object] | None, installer: str) -> None:
    """Lay out what an installer writes of a package beside it."""
    info = folder / "mblm-1+pure.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mblm\nVersion: 1+pure\n")
    (info / "INSTALLER").write_text(installer + "\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
