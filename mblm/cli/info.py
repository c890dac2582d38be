"""`mblm info` and `mblm models`: what is installed, compiled and missing, and what comes along."""

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import typer

import mblm
from mblm.model.find import packaged_models

OPTIONAL_PACKAGES = (
    "mamba-ssm",
    "causal-conv1d",
    "huggingface_hub",
    "transformers",
    "llguidance",
    "lm_eval",
    "datasets",
    "Pillow",
    "matplotlib",
    "tensorboard",
    "wandb",
    "trackio",
)


def collect_facts() -> dict[str, Any]:
    """What is installed, compiled and missing, by name."""
    import torch

    from mblm.utils.cuda import cuda_properties

    build = mblm.build_info()
    missing = build.pop("missing")
    cuda = cuda_properties()
    return {
        "mblm": mblm.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "native kernels": build,
        "cuda": cuda.cuda_version,
        "cuda devices": cuda.cuda_devices,
        "packages": {name: _version_of(name) for name in OPTIONAL_PACKAGES},
        "missing": missing,
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_facts(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as aligned lines; a nested dictionary is indented."""
    width = max(map(len, facts)) + 2
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [name, *format_facts(value, indent + "  ")]
        elif isinstance(value, list):
            for number, item in enumerate(value or ["none"]):
                lines.append(f"{indent}{'' if number else name:{width}}{item}")
        else:
            if value is None or isinstance(value, bool):
                value = {True: "yes", False: "no", None: "-"}[value]
            lines.append(f"{indent}{name:{width}}{value}")
    return lines


def models() -> None:
    """List the trained models that come with this package, each with its card's first words.

    \b
    Example:
      mblm generate python --prompt "class "
    """
    described = []
    for folder in packaged_models():
        card = (folder / "README.md").read_text(encoding="utf-8")
        about = card.partition("\n# ")[2].split("\n\n")[1]
        described.append("\n  ".join([folder.name, *about.splitlines(), str(folder)]))
    typer.echo("\n\n".join(described))


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, compiled and missing, and how to get it."""
    facts = collect_facts()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(format_facts(facts)))
