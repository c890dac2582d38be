"""What ``import mblm`` brings with it."""

import os
import subprocess
import sys

LATER = [
    "PIL",
    "causal_conv1d",
    "datasets",
    "huggingface_hub",
    "mamba_ssm",
    "matplotlib",
    "tensorboard",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers",
    "typer",
]


def test_imports_nothing_that_is_needed_only_later() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import mblm, mblm.ops;"
        f" print(sorted(set({LATER!r}) & (set(sys.modules) - before)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
