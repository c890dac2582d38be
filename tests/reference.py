"""The published release, by the interpreter that MBLM_REFERENCE_PYTHON names."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

PYTHON = os.environ.get("MBLM_REFERENCE_PYTHON")
needs_reference = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="MBLM_REFERENCE_PYTHON names no interpreter"),
]


def run_program(
    program: str, *arguments: object, folder: Path, python: str | None = PYTHON, path: str = ""
) -> None:
    """Run a program in a folder, by the reference's interpreter if none is given.

    Args:
        path: Its PYTHONPATH, empty for the reference, which must not find this package.
    """
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
