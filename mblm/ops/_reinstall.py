"""The command that compiles the kernels again, as this package was installed."""

import json
import shlex
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


def how_to_compile(package: Path) -> str:
    """What to run, for a message.

    Args:
        package: The folder of the package.
    """
    folder = package.parent
    if (folder / "setup.py").exists():  # sources, maybe installed editable
        for editable in distributions(name="mblm"):
            origin = _origin(editable)
            if origin.get("dir_info", {}).get("editable") and _path(origin) == folder:
                return f"run `{_install(editable)} -e {shlex.quote(str(folder))}`"
        return f"in {folder}, run `python setup.py build_ext --inplace`"
    installed = next(iter(distributions(name="mblm", path=[str(folder)])), None)
    if installed is None:
        return "install mblm beside this torch"
    origin = _origin(installed)
    url = origin.get("url", "")
    if url.endswith(".whl"):
        return (
            "build a wheel beside this torch, `pip wheel --no-deps` in its sources, and install it"
        )
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        target = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    elif "dir_info" in origin:
        target = str(_path(origin))
    else:
        target = url or f"--no-binary mblm mblm=={installed.version.partition('+')[0]}"
    return (
        f"run `{_install(installed)} {target if target.startswith('--') else shlex.quote(target)}`"
    )


def _install(installed: Distribution) -> str:
    """The installer's command: it must neither keep what is there nor take it from its cache."""
    if (installed.read_text("INSTALLER") or "").strip() == "uv":
        python = shlex.quote(sys.executable)  # which uv hides from the build
        return (
            f"MBLM_TORCH_PYTHON={python} uv pip install --python {python} --no-deps --reinstall"
            " --no-cache"
        )
    return "pip install --no-deps --force-reinstall --no-cache-dir"


def _origin(installed: Distribution) -> dict[str, Any]:
    """Where it was installed from (PEP 610); nothing if from an index."""
    text = installed.read_text("direct_url.json")
    return json.loads(text) if text else {}


def _path(origin: dict[str, Any]) -> Path:
    return Path(unquote(urlparse(origin["url"]).path))
