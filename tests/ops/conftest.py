"""Fixtures of the operators' tests."""

import os
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def require_native() -> Callable[[str], None]:
    """Skip a test of a native CPU kernel that is not loaded; fail if it was to be there."""

    def require(name: str) -> None:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"mblm::{name}", "CPU"):
            return
        message = f"the native CPU kernel of mblm::{name} is not loaded"
        if os.environ.get("MBLM_NATIVE") == "require":
            pytest.fail(message)
        pytest.skip(message)

    return require
