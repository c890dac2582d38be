"""Runs one worker script under this package and under the reference release, in one run.

A worker uses only what both packages offer, so that the same lines are timed on both sides. The
reference lives in an environment of its own, made on first use (`--reference` names another).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "mblm==0.4.2"


def at_least(least: int) -> Callable[[str], int]:
    """What reads an argument that is an integer of at least so much."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected a number >= {least}, got {value}")
        return value

    return number


positive = at_least(1)


def existing(text: str) -> Path:
    """Read an argument that names a file or a folder."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return Path(text)


def json_file(text: str) -> Path:
    """Read an argument that names a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    return Path(text)


def parser(
    description: str | None, *, runs: int = 3, threads: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """Options that every benchmark has; ``threads`` are what it runs with one after the other."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"nargs": "+", "default": list(threads)} if threads else {}
    several = several or {"default": os.cpu_count() or 1}
    options.add_argument("--threads", type=positive, help="of PyTorch", **several)
    options.add_argument("--runs", type=positive, default=runs, help="of each measurement")
    options.add_argument("--json", type=json_file, help="write all figures to this file")
    return options


def side_by_side(description: str | None, *, runs: int = 3) -> argparse.ArgumentParser:
    """Those of a benchmark whose workers are processes of their own."""
    options = parser(description, runs=runs)
    options.add_argument(
        "--reference",
        type=Path,
        default=ROOT / "build" / "reference",
        help="environment of the reference release, made if missing",
    )
    options.add_argument("--worker", help=argparse.SUPPRESS)
    return options


def parse(
    options: argparse.ArgumentParser, work: Callable[[dict[str, Any]], Any]
) -> argparse.Namespace:
    """The arguments of a benchmark; a process that is a worker does its job and ends here."""
    arguments = options.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        sys.exit()
    return arguments


def config_of(
    kinds: Sequence[str],
    width: int,
    layers: Sequence[int],
    seq_lens: Sequence[int],
    *,
    first: str | None = None,
    use_flash_attn: bool = False,
    **fields: Any,
) -> Any:
    """A model of fields that both packages know, one width for all stages.

    Args:
        kinds: Of each stage from the top, ``t`` (a Transformer), ``mamba1`` or ``mamba2``.
        first: The positions of a Transformer on top; those below have fixed ones.
        fields: Others of the configuration.
    """
    from mblm import MambaBlock, MBLMModelConfig, TransformerBlock

    def block(kind: str, position: str | None) -> Any:
        if kind == "t":
            return TransformerBlock(
                attn_head_dims=min(64, width // 4),
                attn_num_heads=max(4, width // 64),
                attn_use_rot_embs=True,
                use_flash_attn=use_flash_attn,
                pos_emb_type=position,
            )
        return MambaBlock(
            d_state=128, d_conv=4, expand=2, headdim=64, pos_emb_type=None, block_type=kind
        )

    return MBLMModelConfig(
        num_tokens=257,
        pad_token_id=256,
        hidden_dims=[width] * len(kinds),
        num_layers=list(layers),
        seq_lens=list(seq_lens),
        block=[block(kind, "fixed" if n else first) for n, kind in enumerate(kinds)],
        **{"train_checkpoint_chunks": None, **fields},
    )


def new_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set PyTorch's threads; returns the figures, which begin with the machine, as is printed."""
    import torch

    threads = arguments.threads
    threads = threads if isinstance(threads, int) else max(threads)
    torch.set_num_threads(threads)
    figures = {"machine": machine_line(threads)}
    print(figures["machine"])
    return figures


def reference_python(folder: Path) -> Path:
    """The interpreter of the reference's environment, which is made if it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        import torch

        print(f"making the reference's environment in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        version = torch.__version__.split("+")[0]
        install = [python, "-m", "pip", "install", "-q", f"torch=={version}", REFERENCE]
        subprocess.run(install, check=True)
    return python


def run_worker(
    python: Path | str, script: str, job: dict[str, Any], env: dict[str, str] | None = None
) -> Any:
    """Run ``script --worker JOB`` with an interpreter and return the JSON of its last line.

    ``env`` is its environment, this process's own by default.
    """
    # Outside the repository, so that the reference does not find this package.
    result = subprocess.run(
        [python, "-W", "ignore", Path(script).resolve(), "--worker", json.dumps(job)],
        cwd=Path(script).resolve().parent,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def machine_line(threads: int) -> str:
    """Processor, cores, threads and versions that the figures hold for."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name}, {os.cpu_count()} cores, {threads} threads, {capability}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def spread(values: Sequence[float], form: str = ".4g") -> str:
    """Median and range of repeated measurements."""
    return f"{median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
