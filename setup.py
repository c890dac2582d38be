"""Compiles the native library, ``mblm._C``, as an extension of the torch that is installed.

What can be compiled is: for CUDA, or for the CPU, or nothing, which the version and the import then
say. CONTRIBUTING.md has the variables that decide otherwise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools._distutils import dir_util
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.append(str(ROOT))

from find_tools import NotCompiledError, check_compiler, check_nvcc, import_torch  # noqa: E402

REQUIRED = ["numpy", "pydantic>=2.9", "pyyaml", "mambapy", "tqdm", "safetensors", "typer"]
REQUIRED += ["typing_extensions"]
COMPILE = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
RECORD = "mblm/_build.json"  # what was compiled, or why nothing: mblm/ops/_native.py reads it
# A folder that is read only, as in a container, is built elsewhere.
BUILD = ROOT / "build" if os.access(ROOT, os.W_OK) else Path(tempfile.mkdtemp())
BUILDS = bool(COMPILE & set(sys.argv))
# What of the decoding engine knows no torch, and is compiled as the kernels are.
ENGINE = [
    f"csrc/decode/{name}.cpp"
    for name in ("catch_up", "choose", "memory", "proposer", "rows", "run", "start")
]


def build_compiled(mode: str, record: dict[str, Any]) -> None:
    """Build the package with kernels for the CPU, or for CUDA too."""
    torch = import_torch()
    check_compiler()
    if mode == "cuda":
        check_nvcc(torch)
    from torch.utils import cpp_extension

    csrc, torch_root = str(ROOT / "csrc"), Path(torch.__file__).parent
    kernel_folder = str(BUILD / "kernels")  # which know no torch: they serve every version
    # After Python's own flags, some of which slow the compiler or the kernels down. A message with
    # __FILE__ tells the path inside the project, wherever that is.
    flags = ["-std=c++20", "-g0", "-fno-wrapv", "-fvisibility=hidden"]
    flags += [f"-fmacro-prefix-map={ROOT}/=", f"-fmacro-prefix-map={torch_root}/=torch/"]
    nvcc_flags = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"]
    # So that what another toolkit of the same path has compiled is compiled again.
    nvcc_flags.append(f"-DMBLM_TOOLKIT={(torch.version.cuda or '').split('.')[0]}")
    kernel_flags = {"cxx": [*flags, "-O3"], "nvcc": nvcc_flags}
    glue_flags = [*flags, "-O1"]  # it calls the kernels, and is quick to compile
    if mode == "cuda":
        glue_flags.append("-DMBLM_CUDA")
    if cpp_extension.check_compiler_is_gcc(os.environ["CXX"]):
        # at::parallel_for is inlined and must meet torch's own runtime: none is linked.
        glue_flags.append("-fopenmp")

    class BuildKernels(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(BUILD / f"torch-{torch.__version__}-{mode}")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                said = compiler_output(kernel_folder) or compiler_output(self.build_temp)
                raise NotCompiledError(f"it did not compile: {said or error}") from error

        def build_extension(self, extension: Extension) -> None:
            kernels = sources("cpu/*.cpp") + [s for s in sources("decode/*.cpp") if s in ENGINE]
            if mode == "cuda":
                kernels = [*sources("cuda/*.cu"), *sources("cuda/*.cpp"), *kernels]
            extension.extra_objects = self.compiler.compile(
                kernels, kernel_folder, include_dirs=[csrc], extra_postargs=kernel_flags
            )
            super().build_extension(extension)

    extension = cpp_extension.CUDAExtension if mode == "cuda" else cpp_extension.CppExtension
    arguments = {"include_dirs": [csrc], "extra_compile_args": {"cxx": glue_flags}}
    glue = sources("torch/*.cpp") + sources("decode/*.cpp")
    glue = [source for source in glue if source not in ENGINE]
    library = extension("mblm._C", glue, **arguments)
    release = ".".join(torch.__version__.split(".")[:2])
    name = "cpu" if mode == "cpu" else "cu" + torch.version.cuda.replace(".", "")
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if mode == "cuda" else None
    record |= {"torch": torch.__version__, "mode": mode, "cuda_architectures": architectures}
    run_setup(BuildKernels, library, record, f"{name}.torch{release}", f"torch=={release}.*")


def sources(pattern: str) -> list[str]:
    """The files, the longest first: compiled side by side, they then end together."""
    return [str(p) for p in sorted(Path("csrc").glob(pattern), key=lambda p: -p.stat().st_size)]


def compiler_output(folder: str) -> str:
    """What the compiler says to what does not compile in a folder: the build only showed it."""
    if not Path(folder, "build.ninja").exists():
        return ""
    done = subprocess.run(["ninja", "-C", folder], capture_output=True, text=True, errors="replace")
    lines = done.stdout.strip().splitlines() if done.returncode else []
    return "\n".join([line for line in lines if "error" in line][:8] or lines[-8:])


def run_setup(
    base: type[build_ext], library: Extension, record: dict[str, Any], local: str, torch: str
) -> None:
    """Run setup.py's command; a library without sources is none. pip shows the local version."""

    class BuildLibrary(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.extensions = [library] if library.sources else []

        def run(self) -> None:
            super().run()
            file = Path(RECORD) if self.inplace else Path(self.build_lib, RECORD)
            file.parent.mkdir(parents=True, exist_ok=True)
            for earlier in [] if self.extensions else file.parent.glob("_C*.so"):
                earlier.unlink()
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

        def get_output_mapping(self) -> dict[str, str]:
            ours = {str(Path(self.build_lib, RECORD)): RECORD} if self.inplace else {}
            return {**super().get_output_mapping(), **ours}

    built = BUILD / "lib"
    shutil.rmtree(built, ignore_errors=True)  # an earlier build may have left what is deleted since
    version = re.findall('__version__ = "(.*)"', Path("mblm/__init__.py").read_text("utf-8"))[0]
    # pip takes a release of sources for what its file name says.
    is_release = Path("PKG-INFO").exists() or not BUILDS
    setup(
        version=version if is_release else f"{version}+{local}",
        install_requires=[torch, *REQUIRED],
        ext_modules=[library],
        cmdclass={"build_ext": BuildLibrary},
        options={"build": {"build_base": str(BUILD), "build_lib": str(built)}}
        | ({} if BUILD.parent == ROOT else {"egg_info": {"egg_base": str(BUILD)}}),
    )


def main() -> None:
    """Build what can be built, or what MBLM_BUILD demands."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    wanted = os.environ.get("MBLM_BUILD", "")
    if wanted not in ("", "cpu", "cuda", "none"):
        sys.exit(f"MBLM_BUILD is {wanted!r}; expected cpu, cuda, none or nothing")
    record: dict[str, Any] = {}
    reason = "MBLM_BUILD=none was set when it was installed"
    modes = [] if wanted == "none" or not BUILDS else [wanted] if wanted else ["cuda", "cpu"]
    for mode in modes:
        try:
            return build_compiled(mode, record)
        except NotCompiledError as why:
            if wanted:
                sys.exit(f"MBLM_BUILD={wanted}, but {why}")
            reason = record[f"without_{mode}"] = str(why)
        # The folders that distutils has made may be gone, and would not be made again.
        getattr(dir_util, "SkipRepeatAbsolutePaths", getattr(dir_util, "_path_created", {})).clear()
        if "--dist-info-dir" in sys.argv:  # written for the version that was to be
            at = sys.argv.index("--dist-info-dir")
            del sys.argv[at : at + 2]
    if BUILDS:
        line, what = "!" * 80, "mblm is built WITHOUT its native kernels: it works, but slowly."
        print(line, what, reason, line, sep="\n", flush=True)
    run_setup(build_ext, Extension("mblm._C", []), {"reason": reason}, "pure", "torch>=2.6")


BUILD.mkdir(exist_ok=True)
with open(BUILD / ".lock", "w") as lock:
    if os.name == "posix":  # two installs from one folder share what they write
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
    main()
