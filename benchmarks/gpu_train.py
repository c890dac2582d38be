"""Training steps of the published 2D and 3D configurations on a GPU, beside the reference release.

A step is forward, backward and AdamW's update under autocast to bfloat16, on random bytes of the
configuration's own length and batch. Every run is a process of its own, the two sides take turns,
and peak memory is the most that torch had allocated on the GPU, weights and moments included.

Both sides have the same block types. The reference has Mamba-2 only where mamba_ssm is installed,
else it takes a Mamba-1 in its place: this compares nothing. So stage 1 is a Transformer there, like
the stages below it, and the published Mamba-2 is measured on this side alone. Where a batch does
not fit on one of the sides, both are run again with half of it.

    python benchmarks/gpu_train.py [--wheels FOLDER] [--json FILE] [--quick]

The reference is installed, without a network, from a folder that has the wheels of mblm 0.4.2,
megabyte-pytorch, einops, beartype and mambapy (`pip download --no-deps` gets each), and, where
there are any for this torch, of mamba_ssm and what it needs. Without them this side runs alone.

--quick takes tiny models, on the CPU where there is no GPU: to try this script. Memory is then the
process's largest resident set, less what it was after the imports.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side import (
    REFERENCE,
    ROOT,
    existing,
    json_file,
    parse,
    positive,
    run_worker,
    spread,
    write_json,
)

CONFIGS = ["pg19_2d_st", "pg19_3d_stt"]
QUICK_SEQ_LENS = {2: [16, 8], 3: [16, 4, 8]}
# What the reference imports that neither torch nor this package brings.
NEEDED = {
    "mblm": REFERENCE,
    "MEGABYTE_pytorch": "megabyte-pytorch",
    "einops": "einops",
    "beartype": "beartype",
    "mambapy": "mambapy",
}


def job_of(name: str, top: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A configuration's model and batch, with a stage 1 of mamba2 or of a Transformer."""
    import yaml

    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    model, batch = config["params"], config["train"]["batch_size"]
    model.pop("input_seq_len")
    if top == "transformer":
        model["block"][0] = model["block"][-1]
    if arguments.quick:
        stages = len(model["seq_lens"])
        model |= {"hidden_dims": [128] * stages, "num_layers": [1] * stages}
        model["seq_lens"] = QUICK_SEQ_LENS[stages]
        model["block"] = [
            block | ({"d_state": 16} if "d_state" in block else {"attn_num_heads": 2})
            for block in model["block"]
        ]
        batch = 2
    limits = {"steps": arguments.steps, "seconds": arguments.seconds}
    return {"model": model, "batch": batch, **limits}


def build(model: dict[str, Any]) -> Any:
    import torch

    from mblm import MBLM, MambaBlock, MBLMModelConfig, TransformerBlock

    torch.manual_seed(0)
    blocks = [(MambaBlock if "d_state" in b else TransformerBlock)(**b) for b in model["block"]]
    return MBLM(MBLMModelConfig(**(model | {"block": blocks}))).train()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, after one that is not counted, and peak memory in bytes."""
    import torch

    import mblm.model.mblm  # noqa: F401

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # models so small gain nothing from more
    seconds: list[float] = []
    begun = time.perf_counter()
    try:
        model = build(job["model"]).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.randint(0, 256, (job["batch"], *job["model"]["seq_lens"]), device=device)
        ids = ids.flatten(1)
        for _ in range(1 + job["steps"]):
            begin = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            last = loss.item()  # which waits for the forward pass alone
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            if len(seconds) > 1 and time.perf_counter() - begun > job["seconds"]:
                break
    except torch.OutOfMemoryError:
        return {"is_out_of_memory": True}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "is_out_of_memory": False,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds[1:],
        "peak_bytes": peak,
        "loss": last,
    }


def probe() -> dict[str, Any]:
    """Of the side that this process is on: what is missing, the version, whether it has Mamba-2."""
    from importlib.metadata import version
    from importlib.util import find_spec

    missing = [wheel for module, wheel in NEEDED.items() if find_spec(module) is None]
    if missing:
        return {"error": f"missing: {', '.join(missing)}"}
    try:
        import mblm  # which here imports all there is
        from mblm.model import mamba_shim
    except ImportError as error:
        return {"error": f"importing it fails: {error}"}
    return {
        "error": None,
        "version": version("mblm"),
        "file": mblm.__file__,
        "has_mamba2": mamba_shim.Mamba2Mixer is not None,
    }


def environment(first: Path) -> dict[str, str]:
    """The environment of a side whose `mblm` is in this folder."""
    paths = [str(first), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def install(wheels: Path | None, target: Path) -> dict[str, Any]:
    """Install the reference and say what it is, or in ``error`` why there is none."""
    if wheels is None:
        return {"error": f"no --wheels; it takes {', '.join(NEEDED.values())}"}
    if not (files := sorted(wheels.glob("*.whl"))):
        return {"error": f"no wheel in {wheels}; it takes {', '.join(NEEDED.values())}"}
    if not any(file.name.startswith(REFERENCE.replace("==", "-") + "-") for file in files):
        return {"error": f"missing: {REFERENCE}, of which {wheels} has no wheel"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--target", target, *files], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"pip does not install {wheels}: {done.stderr.strip()}"}
    found = run_worker(sys.executable, __file__, {"probe": True}, environment(target))
    if found["error"] is None and not Path(found["file"]).is_relative_to(target):
        return {"error": f"{found['file']} is imported in place of {REFERENCE}"}
    return dict(found)


def measure(job: dict[str, Any], sides: dict[str, Path], runs: int) -> dict[str, Any]:
    """Run the sides in turns, each with the largest batch, halved, that fits on all."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, folder in sides.items():
            result = run_worker(sys.executable, __file__, job, environment(folder))
            if result["is_out_of_memory"]:
                print(f"{side}: a batch of {job['batch']} does not fit", flush=True)
                if job["batch"] == 1:
                    return {"batch": 1, "does_not_fit": side}
                return measure({**job, "batch": job["batch"] // 2}, sides, runs)
            results[side].append(result)
    return {"batch": job["batch"], "runs": results}


def report(figures: dict[str, Any], num_bytes: int) -> str:
    """Add medians and ratios to what was measured, and print them; returns the ratios in words."""
    if "does_not_fit" in figures:
        return f"a batch of 1 does not fit: {figures['does_not_fit']}"
    for side, runs in figures["runs"].items():
        seconds = [s for run in runs for s in run["seconds"]]
        rate = figures["batch"] * num_bytes / median(seconds)
        peak = max(run["peak_bytes"] for run in runs)
        figures[side] = {"bytes_per_second": rate, "peak_bytes": peak}
        print(
            f"{side:>10}: {spread(seconds)} s a step, {rate:.4g} bytes/s, "
            f"{peak / 2**30:.3g} GiB, {runs[0]['parameters']:,} parameters, "
            f"loss {runs[0]['loss']:.4f}",
            flush=True,
        )
    if "reference" not in figures:
        return "mblm alone"
    ours, theirs = figures["mblm"], figures["reference"]
    for name in ("bytes_per_second", "peak_bytes"):
        figures[f"{name}_ratio"] = ours[name] / theirs[name]
    return (
        f"{figures['bytes_per_second_ratio']:.2f} of the reference's bytes/s, "
        f"{figures['peak_bytes_ratio']:.2f} of its memory"
    )


def compare(arguments: argparse.Namespace, reference: dict[str, Any], target: Path) -> None:
    import torch

    has_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "torch": torch.__version__,
        "reference": reference,
    }
    print(f"{results['device']}, torch {torch.__version__}")
    alone, both = {"mblm": ROOT}, {"mblm": ROOT, "reference": target}
    plan = [(name, "mamba2", alone) for name in CONFIGS]
    if reference["error"] is None:
        if reference["has_mamba2"]:
            plan = [(name, "mamba2", both) for name in CONFIGS]
        else:
            print("the reference has no Mamba-2 without mamba_ssm: Transformers are compared")
            plan = [(name, "transformer", both) for name in CONFIGS] + plan
    else:
        print(f"REFERENCE LEFT OUT: {reference['error']}", file=sys.stderr, flush=True)
    words = []
    for name, top, sides in plan:
        job = job_of(name, top, arguments)
        title = f"{name}, {'as published' if top == 'mamba2' else 'a Transformer on top'}"
        seq_lens = job["model"]["seq_lens"]
        print(f"{title}: {' + '.join(sides)}, seq_lens {seq_lens}", flush=True)
        results[title] = figures = measure(job, sides, arguments.runs)
        num_bytes = 1
        for count in seq_lens:
            num_bytes *= count
        line = report(figures, num_bytes)
        print(f"  {line}, batch {figures['batch']}", flush=True)
        if len(sides) > 1:
            words.append(f"{name}: {line}")
        write_json(arguments.json, results)  # now, too, lest a time limit take it away
    print("; ".join(words) if words else f"REFERENCE LEFT OUT: {reference['error']}")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--wheels", type=existing, help="folder with the reference's wheels")
    options.add_argument("--runs", type=positive, default=2, help="processes of each side")
    options.add_argument("--steps", type=positive, default=5, help="steps timed in each process")
    options.add_argument(
        "--seconds", type=float, default=60, help="no further step of a process after so long"
    )
    options.add_argument("--json", type=json_file, help="write all figures to this file")
    options.add_argument("--quick", action="store_true", help="tiny models, to try this script")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parse(options, lambda job: probe() if "probe" in job else work(job))
    import torch

    if not torch.cuda.is_available() and not arguments.quick:
        sys.exit("no GPU: only --quick runs on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, install(arguments.wheels, Path(folder)), Path(folder))


if __name__ == "__main__":
    main()
