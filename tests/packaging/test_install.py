"""Every way to install the package, each into an environment of its own."""

import ast
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INFO = "from mblm.ops._native import build_info; print(build_info())"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, one for all tests: an install must not disturb the next."""
    target = tmp_path_factory.mktemp("checkout")
    for name in ("cmake", "csrc", "mblm"):
        unwanted = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, target)
    return target


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
        return self.run(
            python, "-m", "pip", "install", "-v", "--no-deps", *arguments, **environment
        )

    def build_info(self) -> dict[str, Any]:
        output = self.run(str(self.bin / "python"), "-W", "ignore", "-c", INFO)
        return ast.literal_eval(output.splitlines()[-1])

    def location(self) -> Path:
        """Where the environment imports the package from."""
        code = "import importlib.util; print(importlib.util.find_spec('mblm').origin)"
        return Path(self.run(str(self.bin / "python"), "-c", code).strip())


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_isolated(environment: Environment, source: Path) -> None:
    environment.pip(str(source))
    assert environment.build_info()["loaded"]
    assert environment.bin.parent in environment.location().parents


def test_what_was_deleted_is_not_installed(environment: Environment, source: Path) -> None:
    module = source / "mblm" / "deleted.py"
    module.touch()
    environment.pip(str(source), MBLM_BUILD="none")
    module.unlink()
    environment.pip("--force-reinstall", str(source), MBLM_BUILD="none")
    assert not (environment.location().parent / "deleted.py").exists()


def test_without_a_compiler(environment: Environment, source: Path) -> None:
    output = environment.pip(str(source), PATH=str(environment.bin))
    assert "WITHOUT its native kernels" in output
    info = environment.build_info()
    assert not info["compiled"] and "no C++ compiler was found" in info["reason"]
    said = environment.run(str(environment.bin / "python"), "-c", "import mblm.ops")
    assert "native kernels are not used" in said


def test_without_torch(tmp_path: Path, source: Path) -> None:
    environment = Environment(tmp_path / "environment")
    next(environment.bin.parent.glob("lib/*/site-packages/outer.pth")).unlink()
    assert "no torch to compile against was found" in environment.pip(str(source))


def test_without_isolation(environment: Environment, source: Path) -> None:
    environment.pip("setuptools", "wheel", "packaging")
    # cmake and ninja are in the folder of the interpreter that runs the tests.
    path = os.pathsep.join([str(environment.bin), str(Path(sys.executable).parent)])
    environment.pip(
        "--no-build-isolation", str(source), PATH=os.pathsep.join([path, os.environ["PATH"]])
    )
    assert environment.build_info()["loaded"]


def test_editable(environment: Environment, source: Path) -> None:
    environment.pip("-e", str(source))
    assert environment.location() == source / "mblm" / "__init__.py"
    assert environment.build_info()["loaded"]
    again = environment.pip("-e", str(source))
    assert "Building CXX" not in again


def test_sdist(environment: Environment, source: Path) -> None:
    backend = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    output = environment.run(str(environment.bin / "python"), "-c", backend, cwd=source)
    environment.pip(str(source / "dist" / output.splitlines()[-1]))
    assert environment.build_info()["loaded"]


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv(environment: Environment, source: Path) -> None:
    environment.run("uv", "pip", "install", "--no-deps", "--no-cache", str(source))
    assert environment.build_info()["loaded"]
