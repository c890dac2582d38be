"""Every way to install the package, each into an environment of its own."""

import ast
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ".".join(torch.__version__.split(".")[:2])
LOAD = "from mblm.ops import _native; _native.load()"
INFO = f"{LOAD}; print(_native.build_info())"


class Environment:
    """A virtual environment that sees the torch of the interpreter that runs the tests."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        packages |= {path for path in site.getsitepackages() if Path(path).is_dir()}
        outer = root / "lib" / version / "site-packages" / "outer.pth"
        outer.write_text("\n".join(sorted(packages)))

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a program in the activated environment; returns all that it printed."""
        unset = ("PYTHONPATH", "MBLM_BUILD", "MBLM_NATIVE", "MBLM_TORCH_PYTHON", "CXX")
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        path = os.pathsep.join([str(self.bin), inherited["PATH"]])
        activated = {**inherited, "PATH": path, "VIRTUAL_ENV": str(self.bin.parent), **environment}
        done = subprocess.run(
            command,
            cwd=cwd or self.bin.parent,
            env=activated,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pip(self, *arguments: str, **environment: str) -> str:
        python = str(self.bin / "python")
        return self.run(python, "-m", "pip", "install", "--no-deps", *arguments, **environment)

    def build_info(self) -> dict[str, Any]:
        output = self.run(str(self.bin / "python"), "-W", "ignore", "-c", INFO)
        return ast.literal_eval(output.splitlines()[-1])

    def record(self) -> dict[str, Any]:
        return json.loads((self.location().parent / "_build.json").read_text())

    def version(self) -> str:
        code = "from importlib.metadata import version; print(version('mblm'))"
        return self.run(str(self.bin / "python"), "-c", code).strip()

    def location(self) -> Path:
        """Where the environment imports the package from."""
        code = "import importlib.util; print(importlib.util.find_spec('mblm').origin)"
        return Path(self.run(str(self.bin / "python"), "-c", code).strip())


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_isolated(environment: Environment, clone: Path) -> None:
    said = environment.pip(str(clone))
    assert f"Successfully installed mblm-{environment.version()}" in said
    assert environment.version().endswith(f"+cpu.torch{RELEASE}")
    assert environment.build_info()["loaded"]
    assert environment.bin.parent in environment.location().parents


def test_what_was_deleted_is_not_installed(environment: Environment, clone: Path) -> None:
    module = clone / "mblm" / "deleted.py"
    module.touch()
    environment.pip(str(clone), MBLM_BUILD="none")
    module.unlink()
    environment.pip("--force-reinstall", str(clone), MBLM_BUILD="none")
    assert not (environment.location().parent / "deleted.py").exists()


def test_without_a_compiler(environment: Environment, clone: Path) -> None:
    said = environment.pip(str(clone), PATH=str(environment.bin))
    assert "+pure" in said
    info = environment.build_info()
    assert not info["compiled"] and "no C++ compiler was found" in info["reason"]
    said = environment.run(str(environment.bin / "python"), "-c", LOAD)
    assert "native kernels are not used" in said
    assert f"`pip install --no-deps --force-reinstall --no-cache-dir '{clone}'`" in said


def test_without_torch(environment: Environment, clone: Path) -> None:
    next(environment.bin.parent.glob("lib/*/site-packages/outer.pth")).unlink()
    assert "+pure" in environment.pip(str(clone))
    assert "no torch to compile against was found" in environment.record()["reason"]


def test_without_isolation(environment: Environment, clone: Path) -> None:
    environment.pip("setuptools==65.5.1", "wheel", "packaging")
    environment.pip("--no-build-isolation", str(clone))
    assert environment.build_info()["loaded"]


def test_editable(environment: Environment, clone: Path) -> None:
    environment.pip("-e", str(clone))
    assert environment.location() == clone / "mblm" / "__init__.py"
    assert environment.build_info()["loaded"]
    assert "ninja: no work to do" in environment.pip("-v", "-e", str(clone))


def test_release_of_sources(environment: Environment, clone: Path) -> None:
    environment.pip("setuptools")
    backend = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    output = environment.run(str(environment.bin / "python"), "-c", backend, cwd=clone)
    environment.pip(str(clone / "dist" / output.splitlines()[-1]))
    assert environment.build_info()["loaded"]
    assert "+" not in environment.version()


def test_wheel_for_another_environment(
    environment: Environment, clone: Path, tmp_path: Path
) -> None:
    environment.run("python", "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(clone))
    (wheel,) = tmp_path.glob("*.whl")
    other = Environment(tmp_path / "other")
    other.pip(str(wheel))
    assert other.build_info()["loaded"]
    record = other.location().parent / "_build.json"
    record.write_text(record.read_text().replace(f'"torch": "{RELEASE}', '"torch": "1.0'))
    assert "they were compiled for torch 1.0" in other.run("python", "-c", LOAD)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git(environment: Environment, clone: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    environment.pip(f"git+{clone.as_uri()}", MBLM_BUILD="none")
    assert "--no-cache-dir 'git+file://" in environment.run("python", "-c", LOAD)
    environment.pip(f"git+{clone.as_uri()}")  # another version: it replaces the pure one
    assert environment.build_info()["loaded"]


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv(environment: Environment, clone: Path) -> None:
    environment.run("uv", "pip", "install", "--no-deps", "--no-cache", str(clone))
    assert environment.build_info()["loaded"]


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_for_an_environment_that_is_not_activated(environment: Environment, clone: Path) -> None:
    python = str(environment.bin / "python")
    install = ["uv", "pip", "install", "--no-deps", "--no-cache", "--python", python, str(clone)]
    outside = {"PATH": "/usr/bin:/bin:" + str(Path(str(shutil.which("uv"))).parent)}
    if "+cpu" not in (said := environment.run(*install, VIRTUAL_ENV="", **outside)):
        assert "+pure" in said
        environment.run(*install, "--reinstall", MBLM_TORCH_PYTHON=python, **outside)
    assert environment.build_info()["loaded"]
