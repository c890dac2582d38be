"""Builds, tests and measures the CUDA kernels on a machine with a GPU, in at most eight minutes.

    bash scripts/gpu_check.sh OUT WHEELS [--quick]
    bash scripts/gpu_check.sh --fetch WHEELS

The machine needs torch with CUDA, nvcc and no network. WHEELS is a folder with what else it lacks
and with the published release, which training is measured beside; --fetch fills it, where there is
a network, for Python 3.12 on x86-64. On a borrowed machine, to which the checkout and build/wheels
(which git ignores) are copied, this is the whole command, with a limit of ten minutes:

    PYTHON=python3 bash scripts/gpu_check.sh "$OUT" build/wheels

The steps stand in `steps`, what matters most first. Each has a limit of its own, and what those
before it have left of theirs; none stops the next, and OUT holds what is known so far at any
moment: summary.json, log.txt and a JSON of each benchmark, at most six files. Ends with a table;
fails if a step did. PYTHON is the interpreter, python3 by default.

--quick tries the script where there is no GPU: tiny sizes, nothing is built.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
QUICK_SECONDS = 600  # of a step with --quick, on however slow a machine
# What is imported on the machine, by this package, its build, its tests and its benchmarks.
NEEDED = ["torch", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"]
NEEDED += ["yaml", "mambapy", "tqdm", "safetensors", "typer", "typing_extensions"]
NEEDED += ["pytest", "hypothesis", "setuptools"]
# In WHEELS: what has compiled parts or pins its needs comes with them, the others alone.
WITH_NEEDS = ["pydantic"]
ALONE = ["mambapy", "mblm==0.4.2", "megabyte-pytorch", "einops", "beartype"]
PLATFORM = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
PLATFORM += [f"--platform={name}_x86_64" for name in ("manylinux_2_17", "manylinux2014")]


def fetch(wheels: Path) -> None:
    """Fill WHEELS."""
    download = [PYTHON, "-m", "pip", "download", "-q", "-d", str(wheels), *PLATFORM]
    subprocess.run([*download, *WITH_NEEDS], check=True)
    subprocess.run([*download, "--no-deps", *ALONE], check=True)


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    command: list[str]
    quick: list[str] | None = None  # what --quick adds to the command; None: it is left out


def steps(out: Path, wheels: Path, site: Path) -> list[Step]:
    """The steps, in their order."""
    this = [PYTHON, str(Path(__file__).resolve())]
    files = [str(f) for f in sorted(wheels.glob("*.whl")) if not f.name.startswith("mblm-")]
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    tests = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    # A test file for which a package is missing does not stop the others.
    tests.append("--continue-on-collection-errors")
    on_device = "tests/inference/test_device_cache.py"
    memcheck = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    memcheck_tests = [memcheck, "--error-exitcode", "9", *tests, on_device, "-k", "moves_between"]

    def benchmark(name: str, seconds: float, *options: str) -> Step:
        command = [PYTHON, f"benchmarks/{name}.py", "--json", str(out / f"{name}.json"), *options]
        return Step(name, seconds, command, quick=["--quick"])

    of_training = ["--wheels", str(wheels), "--runs", "1", "--steps", "3", "--seconds", "8"]
    return [
        Step("wheels", 15, [*pip, "--target", str(site), *files]),
        Step("facts", 30, [*this, str(out), "--facts"], quick=[]),
        Step("build", 125, [*this, "--build"]),
        Step("decoding tests", 55, [*tests, "tests/inference"], quick=["--collect-only", "-m", ""]),
        benchmark("gpu_decode", 90),
        Step("other tests", 50, [*tests, "tests/ops", "tests/model"]),
        benchmark("gpu", 35),
        benchmark("gpu_train", 50, *of_training),
        Step("memcheck", 30, memcheck_tests),
    ]


def find_facts() -> dict[str, Any]:
    """Device and versions, and what cannot be imported."""
    missing = {}
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it is, the package cannot be used
            missing[name] = str(error)
    found: dict[str, Any] = {"python": sys.version.split()[0], "missing": missing, "device": None}
    if "torch" in missing:
        return found
    import torch

    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def build() -> None:
    """Compile for the GPU that is here, unless what was carried here is loaded."""
    import torch

    # The machine may have set these for other GPUs.
    os.environ["MBLM_BUILD"] = "cuda"
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    os.environ["MAX_JOBS"] = str(os.cpu_count())
    loads = (
        "from mblm.ops import _native; import torch; _native.is_loaded() or exit(1); "
        "exit(torch.ops.mblm.device_kind() != 'cuda')"
    )
    if subprocess.run([PYTHON, "-c", loads], cwd=ROOT).returncode == 0:
        print("a library for CUDA was carried here")
    else:
        os.execv(PYTHON, [PYTHON, "setup.py", "build_ext", "--inplace"])


def read_summary(out: Path) -> dict[str, Any]:
    file = out / "summary.json"
    return json.loads(file.read_text()) if file.exists() else {"steps": []}


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Put the file there whole, whenever the check is cut."""
    new = out / "new"
    new.write_text(json.dumps(summary, indent=1) + "\n")
    new.replace(out / "summary.json")


def run(command: list[str], seconds: float, environment: dict[str, str], log: IO[bytes]) -> str:
    """Run a command to its end or the limit; returns what became of it."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it is ended with all that it started
        )
    except OSError as error:
        return f"not begun: {error}"
    try:
        code = process.wait(seconds)
        return f"failed ({code})" if code else "ok"
    except subprocess.TimeoutExpired:
        return f"over {seconds:.3g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def take(step: Step, seconds: float, environment: dict[str, str], out: Path) -> None:
    """Run a step within a limit and write down what became of it."""
    begin = time.monotonic()
    with (out / "log.txt").open("ab+") as log:
        log.write(f"== {step.name}\n".encode())
        log.flush()
        start = log.tell()
        result = run(step.command, seconds, environment, log)
        log.seek(start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    took = round(time.monotonic() - begin, 1)
    last = lines[-1][:300] if lines else ""
    told = {"step": step.name, "result": result, "seconds": took, "last_line": last}
    print(*lines[-25:], f"== {step.name}: {result}, {took} s", sep="\n", flush=True)
    summary = read_summary(out)
    summary["steps"].append(told)
    write_summary(out, summary)


def check(out: Path, wheels: Path, quick: bool) -> bool:
    """Take all steps; whether all went well."""
    out.mkdir(parents=True, exist_ok=True)
    write_summary(out, {"steps": []})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the step, too
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
        if not quick:
            environment["MBLM_NATIVE"] = "require"
        end = time.monotonic()
        for step in steps(out.resolve(), wheels.resolve(), Path(folder)):
            if quick:
                if step.quick is None:
                    continue
                step = replace(step, seconds=QUICK_SECONDS, command=[*step.command, *step.quick])
            end += step.seconds
            take(step, end - time.monotonic(), environment, out)
            if step.name == "facts" and not quick and read_summary(out).get("device", "") is None:
                print("no GPU: only --quick runs without one", file=sys.stderr)
                break
    print(f"\n{'step':16} {'result':12} {'seconds':>8}  last line")
    taken = read_summary(out)["steps"]
    for told in taken:
        line = told["last_line"][:100]
        print(f"{told['step']:16} {told['result']:12} {told['seconds']:>8}  {line}")
    return all(told["result"] == "ok" for told in taken)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("out", type=Path, nargs="?", metavar="OUT")
    options.add_argument("wheels", type=Path, nargs="?", metavar="WHEELS")
    options.add_argument("--fetch", type=Path, metavar="WHEELS", help="fill this folder")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to try this script")
    for step in ("facts", "build"):
        options.add_argument(f"--{step}", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.fetch:
        fetch(arguments.fetch)
    elif arguments.facts:
        found = find_facts()
        write_summary(arguments.out, {**found, **read_summary(arguments.out)})
        print(found)
        sys.exit(bool(found["missing"]))
    elif arguments.build:
        build()
    elif arguments.wheels is None:
        options.error("OUT and WHEELS are needed")
    else:
        sys.exit(not check(arguments.out, arguments.wheels, arguments.quick))


if __name__ == "__main__":
    main()
