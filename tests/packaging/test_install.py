"""Every way to install the package, each into an environment of its own."""

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
ABOUT = f"""
import json
from importlib.metadata import version
{LOAD}
about = {{"version": version("mblm"), "folder": str(_native.PACKAGE), **_native.build_info()}}
print(json.dumps(about))
"""


class Environment:
    """A virtual environment that sees the torch of the interpreter that runs the tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        packages |= {path for path in site.getsitepackages() if Path(path).is_dir()}
        (own,) = root.glob("lib/*/site-packages")
        self.outer = own / "outer.pth"
        self.outer.write_text("\n".join(sorted(packages)))

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a program in the activated environment; returns all that it printed."""
        unset = ("PYTHONPATH", "MBLM_BUILD", "MBLM_NATIVE", "MBLM_TORCH_PYTHON", "CXX")
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        path = os.pathsep.join([str(self.root / "bin"), inherited["PATH"]])
        activated = {**inherited, "PATH": path, "VIRTUAL_ENV": str(self.root), **environment}
        done = subprocess.run(
            command,
            cwd=cwd or self.root,
            env=activated,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def python(self, *arguments: str, **settings: Any) -> str:
        return self.run(str(self.root / "bin" / "python"), *arguments, **settings)

    def pip(self, *arguments: str, **environment: str) -> str:
        return self.python("-m", "pip", "install", "--no-deps", *arguments, **environment)

    def about(self, **environment: str) -> dict[str, Any]:
        """What is installed: version, folder and what it tells of its build."""
        return json.loads(self.python("-W", "ignore", "-c", ABOUT, **environment).splitlines()[-1])

    def warning(self) -> str:
        """What an import says."""
        return self.python("-c", LOAD)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_isolated(environment: Environment, clone: Path) -> None:
    said = environment.pip(str(clone))
    about = environment.about()
    assert about["loaded"] and about["version"].endswith(f"+cpu.torch{RELEASE}")
    assert f"Successfully installed mblm-{about['version']}" in said
    assert environment.root in Path(about["folder"]).parents


def test_for_a_user(environment: Environment, clone: Path, tmp_path: Path) -> None:
    """Who does not write into the interpreter's own folders."""
    configuration = environment.root / "pyvenv.cfg"
    text = configuration.read_text().replace("packages = false", "packages = true")
    configuration.write_text(text)
    home = {"PYTHONUSERBASE": str(tmp_path / "home")}
    environment.pip("--user", str(clone), **home)
    about = environment.about(**home)
    assert about["loaded"] and tmp_path / "home" in Path(about["folder"]).parents


def test_what_was_deleted_is_not_installed(environment: Environment, clone: Path) -> None:
    module = clone / "mblm" / "deleted.py"
    module.touch()
    environment.pip(str(clone), MBLM_BUILD="none")
    module.unlink()
    environment.pip("--force-reinstall", str(clone), MBLM_BUILD="none")
    assert not Path(environment.about()["folder"], "deleted.py").exists()


def test_without_a_compiler(environment: Environment, clone: Path) -> None:
    said = environment.pip(str(clone), PATH=str(environment.root / "bin"))
    assert "+pure" in said
    about = environment.about()
    assert not about["compiled"] and "no C++ compiler was found" in about["reason"]
    said = environment.warning()
    assert "native kernels are not used" in said
    assert f"`pip install --no-deps --force-reinstall --no-cache-dir '{clone}'`" in said


def test_without_torch(environment: Environment, clone: Path) -> None:
    environment.outer.unlink()
    assert "+pure" in environment.pip(str(clone))
    (record,) = environment.root.glob("lib/*/site-packages/mblm/_build.json")
    assert "no torch to compile against was found" in record.read_text()


def test_without_isolation(environment: Environment, clone: Path) -> None:
    environment.pip("setuptools==65.5.1", "wheel", "packaging")
    environment.pip("--no-build-isolation", str(clone))
    assert environment.about()["loaded"]


def test_editable(environment: Environment, clone: Path) -> None:
    environment.pip("-e", str(clone))
    about = environment.about()
    assert about["loaded"] and about["folder"] == str(clone / "mblm")
    assert "ninja: no work to do" in environment.pip("-v", "-e", str(clone))


def test_release_of_sources(environment: Environment, clone: Path) -> None:
    environment.pip("setuptools")
    backend = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    output = environment.python("-c", backend, cwd=clone)
    environment.pip(str(clone / "dist" / output.splitlines()[-1]))
    about = environment.about()
    assert about["loaded"] and "+" not in about["version"]


def test_wheel_for_another_environment(
    environment: Environment, clone: Path, tmp_path: Path
) -> None:
    environment.python("-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(clone))
    (wheel,) = tmp_path.glob("*.whl")
    other = Environment(tmp_path / "other")
    other.pip(str(wheel))
    about = other.about()
    assert about["loaded"]
    record = Path(about["folder"], "_build.json")
    record.write_text(record.read_text().replace(f'"torch": "{RELEASE}', '"torch": "1.0'))
    assert "they were compiled for torch 1.0" in other.warning()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git(environment: Environment, clone: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    environment.pip(f"git+{clone.as_uri()}", MBLM_BUILD="none")
    assert "--no-cache-dir 'git+file://" in environment.warning()
    environment.pip(f"git+{clone.as_uri()}")  # another version: it replaces the pure one
    assert environment.about()["loaded"]


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv(environment: Environment, clone: Path) -> None:
    environment.run("uv", "pip", "install", "--no-deps", "--no-cache", str(clone))
    assert environment.about()["loaded"]


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_for_an_environment_that_is_not_activated(environment: Environment, clone: Path) -> None:
    python = str(environment.root / "bin" / "python")
    install = ["uv", "pip", "install", "--no-deps", "--no-cache", "--python", python, str(clone)]
    outside = {"PATH": "/usr/bin:/bin:" + str(Path(str(shutil.which("uv"))).parent)}
    if "+cpu" not in (said := environment.run(*install, VIRTUAL_ENV="", **outside)):
        assert "+pure" in said
        environment.run(*install, "--reinstall", MBLM_TORCH_PYTHON=python, **outside)
    assert environment.about()["loaded"]
