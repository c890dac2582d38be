"""Builds the package, with the native library for CUDA, or for the CPU, or without it.

What can be compiled is; the version and the import say what was. CONTRIBUTING.md has the variables
that decide otherwise.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.append(str(ROOT))

from find_torch import NotCompiledError, import_torch  # noqa: E402

REQUIRED = ["numpy", "pydantic>=2.9", "pyyaml", "mambapy", "tqdm", "safetensors", "typer"]
REQUIRED += ["typing_extensions", "filelock"]
COMPILE = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
RECORD = "mblm/_build.json"  # what was compiled, or why nothing: mblm/ops/_native.py reads it
NOTHING = Extension("mblm._C", [])  # a library without sources
# A folder that is read only, as in a container, is built elsewhere.
BUILD = ROOT / "build" if os.access(ROOT, os.W_OK) else Path(tempfile.mkdtemp())


def build_compiled(mode: str, without_cuda: str | None) -> None:
    """Build the package with kernels for the CPU, or for CUDA too."""
    torch = import_torch()
    from compile_library import BuildLibrary, native_library

    name, architectures = "cpu", None
    if mode == "cuda":
        name = "cu" + str(torch.version.cuda).replace(".", "")
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    # Kernels know no torch: their folder serves every version.
    library = native_library(mode == "cuda", BUILD / "kernels")
    record = {"torch": torch.__version__, "mode": mode, "cuda_architectures": architectures}
    record["without_cuda"] = without_cuda
    release = ".".join(torch.__version__.split(".")[:2])
    run_setup(BuildLibrary, library, record, f"+{name}.torch{release}", f"torch=={release}.*")


def run_setup(
    base: type[build_ext], library: Extension, record: dict[str, Any], local: str, torch: str
) -> None:
    """Run setup.py's command. The version's local part is what pip shows of a build."""

    class BuildRecorded(base):
        def run(self) -> None:
            self.extensions = [library] if library.sources else []
            # Kept: an editable install compiles in a folder that is removed.
            self.build_temp = str(folder / f"temp-{sys.implementation.cache_tag}")
            super().run()
            file = Path(RECORD) if self.inplace else Path(self.build_lib, RECORD)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    folder = BUILD / f"torch-{record.get('torch')}-{record.get('mode')}"
    shutil.rmtree(folder / "lib", ignore_errors=True)  # it may hold what has been deleted since
    egg_info = {"tag_build": local}  # but a release of sources has a setup.cfg without a tag
    if BUILD.parent != ROOT:
        egg_info["egg_base"] = str(BUILD)
    setup(
        install_requires=[torch, *REQUIRED],
        ext_modules=[library],
        cmdclass={"build_ext": BuildRecorded},
        options={
            "build": {"build_base": str(folder), "build_lib": str(folder / "lib")},
            "egg_info": egg_info,
            "dist_info": {"keep_egg_info": "1"},  # which another attempt does not make again
        },
    )


def main() -> None:
    """Build what can be built, or what MBLM_BUILD demands."""
    wanted = os.environ.get("MBLM_BUILD", "")
    modes = {"": ["cuda", "cpu"], "cuda": ["cuda"], "cpu": ["cpu"], "none": []}
    if wanted not in modes:
        sys.exit(f"MBLM_BUILD is {wanted!r}; expected cpu, cuda, none or nothing")
    if not COMPILE & set(sys.argv):
        return run_setup(build_ext, NOTHING, {}, "", "torch>=2.6")
    reason = None
    for mode in modes[wanted]:
        try:
            return build_compiled(mode, without_cuda=reason)
        except NotCompiledError as why:
            if wanted:
                sys.exit(f"MBLM_BUILD={wanted}, but {why}")
            reason = str(why)
        if "--dist-info-dir" in sys.argv:  # written for the version that was to be
            at = sys.argv.index("--dist-info-dir")
            del sys.argv[at : at + 2]
    reason = reason or "MBLM_BUILD=none was set when it was installed"
    line, what = "!" * 80, "mblm is built WITHOUT its native kernels: it works, but slowly."
    print(line, what, reason, line, sep="\n", flush=True)
    run_setup(build_ext, NOTHING, {"reason": reason}, "+pure", "torch>=2.6")


BUILD.mkdir(exist_ok=True)
with open(BUILD / ".lock", "w") as lock:
    if os.name == "posix":  # two installs from one folder share what they write
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
    main()
