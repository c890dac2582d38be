"""How mamba_ssm is looked for: absent, broken, present."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from mblm.model.mamba_scans import _mamba_ssm

MODULE = "mamba_ssm.ops.some_module"


@pytest.fixture(autouse=True)
def fresh_search() -> Iterator[None]:
    _mamba_ssm.cache_clear()
    yield
    _mamba_ssm.cache_clear()


def find(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    spec = importlib.util.spec_from_loader("mamba_ssm", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


def test_absent_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=False)
    assert _mamba_ssm(MODULE, "function") is None


def test_broken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.warns(UserWarning, match="mamba_ssm is installed but .* cannot be imported"):
        assert _mamba_ssm(MODULE, "function") is None


def test_present_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, installed=True)
    module = ModuleType(MODULE)
    module.function = len
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert _mamba_ssm(MODULE, "function") is len
