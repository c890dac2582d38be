"""setup.py and CMakeLists.txt: what is compiled, what is not compiled twice, what is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOUD = "WITHOUT its native kernels"

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler on this machine",
)


def build(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py's build of the library into ``target``, as an install does."""
    clean = {k: v for k, v in os.environ.items() if k != "MBLM_BUILD"}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)],
        cwd=source,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def record(target: Path) -> dict[str, str | None]:
    return json.loads((target / "mblm" / "_build.json").read_text())


@needs_compiler
def test_compiles_once(tmp_path: Path) -> None:
    first = build(ROOT, tmp_path / "first", MBLM_BUILD="cpu")
    assert first.returncode == 0, first.stdout + first.stderr
    again = build(ROOT, tmp_path / "again", MBLM_BUILD="cpu")
    assert "no work to do" in again.stdout or "Built target _C" in again.stdout, again.stdout
    assert "Building CXX" not in again.stdout
    for target in (tmp_path / "first", tmp_path / "again"):
        assert record(target)["mode"] == "cpu"
    library = (tmp_path / "again" / "mblm" / "_C.so").read_bytes()
    for folder in (ROOT, Path(sys.prefix)):
        assert f"{folder}/".encode() not in library, "the library holds a path of this machine"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MBLM_BUILD": "none"}, "MBLM_BUILD=none was set"),
        ({"CXX": "/nowhere/g++"}, "no C++ compiler was found (looked for /nowhere/g++)"),
        ({"MBLM_TORCH_PYTHON": "/nowhere/python"}, "no torch to compile against was found"),
    ],
    ids=["unwanted", "no-compiler", "no-torch"],
)
def test_falls_back_loudly(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    done = build(ROOT, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert LOUD in done.stderr and reason in done.stderr
    assert reason in record(tmp_path)["reason"]
    assert not (tmp_path / "mblm" / "_C.so").exists()


def test_fallback_removes_an_earlier_library(tmp_path: Path) -> None:
    (tmp_path / "mblm").mkdir()
    (tmp_path / "mblm" / "_C.so").write_text("of an earlier build")
    build(ROOT, tmp_path, MBLM_BUILD="none")
    assert not (tmp_path / "mblm" / "_C.so").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MBLM_BUILD": "cpu", "CXX": "/nowhere/g++"}, "MBLM_BUILD=cpu, but no C++ compiler"),
        ({"MBLM_BUILD": "gpu"}, "MBLM_BUILD is 'gpu'; expected cpu, cuda, none"),
    ],
)
def test_demands_that_cannot_be_met_are_errors(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    done = build(ROOT, tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.fixture
def broken_source(tmp_path: Path) -> Path:
    """The sources, with a kernel that does not compile and none that do."""
    source = tmp_path / "source"
    for name in ("cmake", "csrc"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "mblm").mkdir()
    (source / "mblm" / "__init__.py").write_text('__version__ = "0"\n')
    for path in (source / "csrc").glob("*/*.cpp"):
        path.unlink()
    (source / "csrc" / "torch" / "broken.cpp").write_text('#error "a kernel that is broken"\n')
    return source


@needs_compiler
def test_compile_errors_are_shown_and_survived(broken_source: Path, tmp_path: Path) -> None:
    done = build(broken_source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert LOUD in done.stderr and "a kernel that is broken" in done.stderr
    assert "a kernel that is broken" in record(tmp_path / "out")["reason"]


@needs_compiler
def test_compile_errors_are_errors_where_kernels_are_demanded(
    broken_source: Path, tmp_path: Path
) -> None:
    done = build(broken_source, tmp_path / "out", MBLM_BUILD="cpu")
    assert done.returncode != 0
    assert "a kernel that is broken" in done.stderr


@needs_compiler
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on PATH")
def test_kernels_pass_their_own_tests(tmp_path: Path) -> None:
    options = ["-DMBLM_BUILD_EXTENSION=OFF", "-DMBLM_BUILD_TESTS=ON"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options],
        ["cmake", "--build", str(tmp_path), "--parallel", "2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "compile_commands.json").exists()


@needs_compiler
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on PATH")
@pytest.mark.slow
def test_decoding_passes_its_tests_under_sanitizers() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "scripts" / "sanitize.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
