"""A clone cut to two sources, for tests of what a build does rather than of what it builds."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The module as pybind11 would make it, without its headers, which take seconds.
MODULE = """
#include <Python.h>
#ifdef MBLM_BROKEN
#error "a kernel that is broken"
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def cut_clone(target: Path) -> Path:
    """Copy what a build needs to ``target``, with one kernel and one file of glue."""
    names = "setup.py find_torch.py compile_library.py pyproject.toml README.md LICENSE MANIFEST.in"
    names += " csrc/cpu/ids.cpp csrc/cpu/ids.h mblm/__init__.py mblm/py.typed"
    for name in f"{names} mblm/ops/_native.py mblm/ops/_reinstall.py".split():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    (target / "mblm" / "ops" / "__init__.py").touch()
    (target / "csrc" / "torch").mkdir()
    (target / "csrc" / "torch" / "bind.cpp").write_text(MODULE)
    return target


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A cut clone in a folder with a name that needs quoting."""
    return cut_clone(tmp_path / "a clone ü")
