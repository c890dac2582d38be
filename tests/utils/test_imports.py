"""A user's modules are imported by name, from the working folder too."""

import sys
from pathlib import Path

import pytest

from mblm.utils.imports import import_modules


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])


def test_a_module_of_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "mine_for_a_test.py").write_text("import sys\nsys.imported_for_a_test = 1\n")
    import_modules(["mine_for_a_test"])
    assert vars(sys).pop("imported_for_a_test") == 1
    del sys.modules["mine_for_a_test"]


def test_says_that_there_is_none() -> None:
    for name in ("absent_module", "absent_module.part", "json.absent"):
        with pytest.raises(ValueError, match=f"--import: no module {name} here"):
            import_modules([name])

    for name in ("", ".", ".relative"):
        with pytest.raises(ValueError, match=f"--import: expected a module's name.*got '{name}'"):
            import_modules([name])


def test_what_a_module_raises_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "needs_another.py").write_text("import absent_module\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_module'"):
        import_modules(["needs_another"])
