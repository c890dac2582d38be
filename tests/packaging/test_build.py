"""setup.py: what is compiled, what is not compiled twice, what is said."""

import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_library
import find_torch
from tests.fresh import Fresh

ROOT = Path(__file__).resolve().parents[2]
RUN_SETUP = """
import runpy, sys
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""
# As root, a process may write everywhere.
DROP_CAPABILITIES = """
import ctypes
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
"""
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mblm._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
# What fails after its metadata was written.
MAKE_WHEEL = """
import os, sys
from setuptools import build_meta
_, kind, folder = sys.argv
info = getattr(build_meta, f"prepare_metadata_for_build_{kind}")(folder)
assert "+cpu." in info, info
os.environ["CFLAGS"] = "-DMBLM_BROKEN"
print(getattr(build_meta, f"build_{kind}")(folder, None, os.path.join(folder, info)))
"""
LOUD = "WITHOUT its native kernels"
RELEASE = ".".join(torch.__version__.split(".")[:2])

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler on this machine",
)


def start(source: Path, *command: str, code: str = RUN_SETUP, **environment: str) -> Fresh:
    """Run setup.py as an installer does."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MBLM_")}
    return started(code, *command, cwd=source, env={**clean, **environment})


def started(code: str, *arguments: object, **settings: Any) -> Fresh:
    """Run code in a process that has imported what a build imports."""
    return Fresh(code, *arguments, imported="torch.utils.cpp_extension", **settings)


def said_by(process: Fresh) -> str:
    """All that one says that ends well."""
    said = process.wait().stdout + process.stderr
    assert process.returncode == 0, said
    return said


def build(source: Path, target: Path, **settings: str) -> str:
    """Build the library into ``target``; returns what was said."""
    return said_by(start(source, "build_ext", "--build-lib", str(target), **settings))


def record(target: Path) -> dict[str, str | None]:
    return json.loads((target / "mblm" / "_build.json").read_text())


def library(target: Path) -> Path | None:
    return next((target / "mblm").glob("_C*.so"), None)


def loads(target: Path) -> bool:
    """Whether a Python takes the library for its module."""
    path = library(target)
    return path is not None and started(LOAD, path).wait().returncode == 0


@needs_compiler
def test_compiles_once(clone: Path, tmp_path: Path) -> None:
    first = build(clone, tmp_path / "first", MAX_JOBS="1")
    assert "csrc/cpu/ids.cpp" in first
    assert build(clone, tmp_path / "again").count("ninja: no work to do") == 2  # kernels, glue
    editable = said_by(start(clone, "editable_wheel", "--dist-dir", str(tmp_path / "editable")))
    assert editable.count("ninja: no work to do") == 2
    for target in (tmp_path / "first", tmp_path / "again"):
        assert record(target)["mode"] == "cpu" and loads(target)
    content = library(tmp_path / "again").read_bytes()  # type: ignore[union-attr]
    for folder in (clone, torch.__path__[0]):
        assert f"{folder}/".encode() not in content, "the library holds a path of this machine"


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang++ on this machine")
def test_compiles_with_clang(clone: Path, tmp_path: Path) -> None:
    assert LOUD not in build(clone, tmp_path, CXX="clang++") and loads(tmp_path)


@needs_compiler
def test_a_copied_clone_is_built_afresh(clone: Path, tmp_path: Path) -> None:
    build(clone, tmp_path / "first")
    moved = tmp_path / "moved"
    clone.rename(moved)
    said = build(moved, tmp_path / "second")
    assert LOUD not in said and loads(tmp_path / "second")


@needs_compiler
def test_two_builds_at_once_get_the_library_both(clone: Path, tmp_path: Path) -> None:
    targets = [tmp_path / "first", tmp_path / "second"]
    builds = [start(clone, "build_ext", "--build-lib", str(target)) for target in targets]
    for process, target in zip(builds, targets, strict=True):
        said_by(process)
        assert loads(target)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MBLM_BUILD": "none"}, "MBLM_BUILD=none was set"),
        ({"CXX": "/nowhere/g++"}, "no C++ compiler was found (looked for /nowhere/g++)"),
        ({"CXX": "ccache g++"}, "or set CXX to one word"),
        ({"CXX": "false"}, "it did not compile"),
        ({"MBLM_TORCH_PYTHON": "/nowhere/python"}, "no torch to compile against was found"),
        ({"CXXFLAGS": "-DMBLM_BROKEN", "CFLAGS": "-DMBLM_BROKEN"}, "a kernel that is broken"),
    ],
    ids=["unwanted", "no-compiler", "several-words", "no-working-compiler", "no-torch", "broken"],
)
def test_falls_back_loudly_unless_it_must_not(
    clone: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    said = build(clone, tmp_path, **environment)
    assert LOUD in said and reason in said
    assert reason in str(record(tmp_path)["reason"])
    assert library(tmp_path) is None
    if "MBLM_BUILD" not in environment:
        command = ["build_ext", "--build-lib", str(tmp_path / "demanded")]
        process = start(clone, *command, **environment, MBLM_BUILD="cpu").wait()
        assert process.returncode != 0 and not library(tmp_path / "demanded")
        assert "MBLM_BUILD=cpu, but " in process.stderr and reason in process.stderr


def test_sources_that_are_missing_are_named(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / "csrc" / "cpu")
    said = build(clone, tmp_path)
    assert LOUD in said and "csrc holds no cpu/*.cpp or decode/*.cpp" in said


def test_another_demand_is_refused(clone: Path) -> None:
    process = start(clone, "build_ext", MBLM_BUILD="gpu").wait()
    assert process.returncode != 0
    assert "MBLM_BUILD is 'gpu'; expected cpu, cuda, none" in process.stderr


@needs_compiler
def test_without_ninja(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "g++", "gcc", "cc", "as", "ld", "which"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    build(clone, tmp_path / "out", PATH=str(tools))
    assert loads(tmp_path / "out")


def metadata(source: Path, target: Path, **environment: str) -> str:
    """What an installer is told of the package before it is built."""
    target.mkdir()
    said_by(start(source, "dist_info", "--output-dir", str(target), **environment))
    (file,) = target.glob("*.dist-info/METADATA")
    return file.read_text()


@needs_compiler
def test_the_version_says_what_is_compiled(clone: Path, tmp_path: Path) -> None:
    compiled = metadata(clone, tmp_path / "compiled")
    assert re.search(rf"^Version: [\d.]+\+cpu\.torch{re.escape(RELEASE)}$", compiled, re.MULTILINE)
    assert f"Requires-Dist: torch=={RELEASE}.*" in compiled
    pure = metadata(clone, tmp_path / "pure", MBLM_BUILD="none")
    assert re.search(r"^Version: [\d.]+\+pure$", pure, re.MULTILINE)
    assert "Requires-Dist: torch>=2.6" in pure


def test_a_release_of_sources_is_whole_and_keeps_its_version(clone: Path, tmp_path: Path) -> None:
    """pip refuses a file whose content has another version than its name."""
    for folder in ("configs", "dev"):
        shutil.copytree(ROOT / folder, clone / folder)
    said_by(start(clone, "sdist", "--dist-dir", str(tmp_path)))
    (archive,) = tmp_path.glob("mblm-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    source = archive.with_name(archive.name.removesuffix(".tar.gz"))
    for name in ["configs/first.yaml", "dev/LOG.md", "csrc/cpu/ids.cpp", "compile_library.py"]:
        assert (source / name).exists(), name
    text = metadata(source, tmp_path / "metadata", MBLM_BUILD="none")
    assert re.search(r"^Version: [\d.]+$", text, re.MULTILINE)


def test_the_models_that_come_along_are_installed(clone: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mblm" / "models", clone / "mblm" / "models")
    said_by(start(clone, "build", "--build-lib", str(tmp_path / "built"), MBLM_BUILD="none"))
    built = (tmp_path / "built").glob("mblm/models/*/*")
    installed = {str(file.relative_to(tmp_path / "built")) for file in built}
    assert installed == {str(file.relative_to(ROOT)) for file in ROOT.glob("mblm/models/*/*")}


@needs_compiler
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_wheel_says_what_failed_after_its_metadata_was_written(
    clone: Path, tmp_path: Path, kind: str
) -> None:
    (clone / "mblm" / "_C.so").write_text("of an earlier build in place")
    process = started(MAKE_WHEEL, kind, tmp_path, cwd=clone).wait()
    assert process.returncode == 0, process.stderr
    wheel = tmp_path / process.stdout.splitlines()[-1]
    assert "+pure" in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    assert not list((tmp_path / "wheel").rglob("_C*.so"))
    (file,) = (tmp_path / "wheel").glob("*+pure.dist-info/METADATA")
    assert "Requires-Dist: torch>=2.6" in file.read_text()


@needs_compiler
def test_a_folder_that_is_read_only_is_built_elsewhere(clone: Path, tmp_path: Path) -> None:
    for path in (clone, *clone.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    build(clone, tmp_path / "out", code=DROP_CAPABILITIES + RUN_SETUP)
    assert loads(tmp_path / "out") and not (clone / "build").exists()


@pytest.mark.parametrize("environment", [{"UV": "/bin/uv"}, {}], ids=["uv", "build"])
def test_the_environment_that_a_build_is_for_is_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """uv and ``python -m build`` build in an environment of their own."""
    (tmp_path / "python").touch()
    monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path), **environment})
    monkeypatch.setattr(sys, "prefix", sys.prefix if environment else "/tmp/build-env-x")
    assert find_torch.outer_pythons()[:2] == [sys.executable, str(tmp_path / "python")]


@needs_compiler
def test_headers_of_python_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # CXX becomes what is found
    compile_library.check_compiler()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(compile_library.NotCompiledError, match=r"Python.h is missing.*python3-dev"):
        compile_library.check_compiler()


@pytest.mark.parametrize(
    ("cuda", "release", "message"),
    [
        (None, None, "was built without CUDA"),
        ("13.0", None, "nvcc was not found"),
        ("13.0", "12.8", "nvcc is of CUDA 12, torch's is 13.0"),
        ("12.6", "13.0", "nvcc is of CUDA 13, torch's is 12.6"),
        ("12.6", "12.8", None),
    ],
)
def test_cuda_needs_a_toolkit_of_its_major_version(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    release: str | None,
    message: str | None,
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", cuda)
    if release:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\necho Cuda tools, release {release}\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    if message is None:
        assert compile_library.check_nvcc() == "12"
        return
    with pytest.raises(compile_library.NotCompiledError, match=message):
        compile_library.check_nvcc()
