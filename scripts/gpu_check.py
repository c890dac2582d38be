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
moment: summary.json, a JSON of each benchmark and logs.tar.gz, at most six files. Ends with a
table; fails if a step did. PYTHON is the interpreter, python3 by default.

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
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
NOTHING = [PYTHON, "-c", "pass"]
FACTS = "facts: "  # what the line begins with that has them
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
    quick: list[str] | None = None  # in place of the command; the command and --quick by default


def steps(out: Path, wheels: Path, site: Path) -> list[Step]:
    """The steps, in their order."""
    this = [PYTHON, str(Path(__file__).resolve())]
    files = [str(f) for f in sorted(wheels.glob("*.whl")) if not f.name.startswith("mblm-")]
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    tests = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    # A test file for which a package is missing does not stop the others.
    tests.append("--continue-on-collection-errors")
    on_device = "tests/inference/test_device_cache.py"
    of_slots = [*tests, on_device, "-k", "moves_between"]
    memcheck = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

    def benchmark(name: str, *options: str) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", "--json", str(out / f"{name}.json"), *options]

    train = benchmark("gpu_train", "--wheels", str(wheels), "--runs", "1", "--steps", "3")
    return [
        Step("wheels", 15, [*pip, "--target", str(site), *files], NOTHING),
        Step("facts", 30, [*this, "--facts"], [*this, "--facts"]),
        Step("build", 125, [*this, "--build"], NOTHING),
        Step("decoding tests", 55, [*tests, "tests/inference"], [*tests, on_device]),
        Step("decoding", 90, benchmark("gpu_decode")),
        Step("other tests", 50, [*tests, "tests/ops", "tests/model"], NOTHING),
        Step("operators", 35, benchmark("gpu")),
        Step("training", 50, [*train, "--seconds", "8"]),
        Step(
            "memcheck",
            30,
            [memcheck, "--error-exitcode", "9", *of_slots],
            [*of_slots, "--collect-only"],
        ),
    ]


def facts() -> dict[str, Any]:
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


class Check:
    """The steps that were taken, and what is known of them in OUT."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self.out, self.environment = out, environment
        self.logs = Path(tempfile.mkdtemp())
        self.summary: dict[str, Any] = {"steps": []}
        self.is_cut = False

    def take(self, step: Step) -> None:
        """Run a step and write down what became of it."""
        log = self.logs / f"{step.name.replace(' ', '_')}.log"
        begin = time.monotonic()
        with log.open("wb") as to:
            result = self._run(step, to)
        lines = log.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        seconds = round(time.monotonic() - begin, 1)
        told = {"step": step.name, "result": result, "seconds": seconds, "last_line": last[:300]}
        self.summary["steps"].append(told)
        facts = [line for line in lines if line.startswith(FACTS)]
        if step.name == "facts" and facts:
            self.summary = {**json.loads(facts[-1].removeprefix(FACTS)), **self.summary}
        print(*lines[-25:], f"== {step.name}: {result}, {seconds} s", sep="\n", flush=True)
        self.write()

    def _run(self, step: Step, log: Any) -> str:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a step is ended with all that it started
            )
        except OSError as error:
            return f"not begun: {error}"
        try:
            code = process.wait(step.seconds)
            return "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            return f"over {step.seconds:.3g} s"
        except KeyboardInterrupt:
            self.is_cut = True
            return "cut"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def write(self) -> None:
        """Put each file there whole, whenever the check is cut."""
        new = self.out / "new"
        new.write_text(json.dumps(self.summary, indent=1) + "\n")
        new.replace(self.out / "summary.json")
        with tarfile.open(new, "w:gz") as archive:
            archive.add(self.logs, "logs")
        new.replace(self.out / "logs.tar.gz")

    def table(self) -> bool:
        """Print what became of the steps; whether all went well."""
        taken = self.summary["steps"]
        print(f"\n{'step':16} {'result':12} {'seconds':>8}  last line")
        for told in taken:
            line = told["last_line"][:100]
            print(f"{told['step']:16} {told['result']:12} {told['seconds']:>8}  {line}")
        return all(told["result"] == "ok" for told in taken)


def check(out: Path, wheels: Path, quick: bool) -> bool:
    """Take all steps, unless a signal cuts them short; whether all went well."""
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
        if not quick:
            environment["MBLM_NATIVE"] = "require"
        done = Check(out, environment)
        spare = 0.0  # seconds
        for step in steps(out.resolve(), wheels.resolve(), Path(folder)):
            step = replace(step, seconds=step.seconds + max(0.0, spare))
            if quick:
                command = step.quick or [*step.command, "--quick"]
                step = replace(step, seconds=QUICK_SECONDS, command=command)
            done.take(step)
            spare = step.seconds - done.summary["steps"][-1]["seconds"]
            if done.is_cut:
                break
            if step.name == "facts" and not quick and done.summary.get("device", "") is None:
                print("no GPU: only --quick runs without one", file=sys.stderr)
                break
        shutil.rmtree(done.logs)
        return done.table()


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
        found = facts()
        print(FACTS + json.dumps(found))
        sys.exit(bool(found["missing"]))
    elif arguments.build:
        build()
    elif arguments.wheels is None:
        options.error("OUT and WHEELS are needed")
    else:
        sys.exit(not check(arguments.out, arguments.wheels, arguments.quick))


if __name__ == "__main__":
    main()
