"""Train the model `python` that comes with this package, and write its folder and its card.

    python scripts/train_python_model.py
    python scripts/train_python_model.py --run data/output/python_sources_...   # that is trained

It learns from the sources of the standard library of the Python that runs this, as
configs/python_sources.yaml says. Every 20th file is held out: of these, every second one is for
validation while it trains, the others are for the score on the card.
"""

import argparse
import json
import lzma
import platform
import sysconfig
from pathlib import Path

import torch
import yaml

from mblm import MBLM, to_text
from mblm.demo import find_sources
from mblm.inference.score_files import FileScore, score_files
from mblm.model.find import PACKAGED_MODELS, find_run
from mblm.train.experiment import load_experiment
from mblm.train.mblm import TrainEntryConfig, train_mblm
from mblm.utils.atomic import atomic_write

CONFIG = Path(__file__).parents[1] / "configs" / "python_sources.yaml"
STDLIB = Path(sysconfig.get_path("stdlib"))
SAMPLES = {"def ": 5, "class ": 6, "    def __init__(self, ": 6}  # prompts and seeds
SAMPLED = {"temperature": 0.7, "top_p": 0.95}

CARD = Path(__file__).with_name("python_model_card.md")


def experiment() -> TrainEntryConfig:
    """The configuration, with the files to train on, to validate on and to score."""
    training, held_out = find_sources(STDLIB)
    config = load_experiment(CONFIG, [f"io.dataset_dir={STDLIB}"])
    assert isinstance(config, TrainEntryConfig)
    config.io.dataset_args = {
        "separator_id": ord("\n"),
        "files": training,
        "valid_files": held_out[::2],
        "test_files": held_out[1::2],
    }
    return TrainEntryConfig.model_validate(config.model_dump())


def write_model(run: Path, folder: Path) -> None:
    """Write the best model of a run as bfloat16, and its card."""
    MBLM.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(folder)
    with atomic_write(folder / "README.md") as card:
        card.write(describe(run, folder).encode())


def describe(run: Path, folder: Path) -> str:
    """The card of a model: what it was made of, its scores and samples."""
    model = MBLM.from_pretrained(folder, dtype=torch.float32)
    record = yaml.safe_load((run / "config.yaml").read_text())
    arguments = record["io"]["dataset_args"]
    files = [STDLIB / name for name in arguments["test_files"]]
    scores = score_files(model, files)
    total = FileScore(sum(s.num_bytes for s in scores), sum(s.bits for s in scores))
    texts = b"".join(file.read_bytes() for file in files)
    num_bytes = sum((STDLIB / name).stat().st_size for name in arguments["files"])
    rows = [
        f"| `{name}` | {score.num_bytes:,} | {score.bits_per_byte:.3f} |"
        for name, score in zip(arguments["test_files"], scores, strict=True)
    ]
    stages = [
        f"{layers} layers of width {width} over {positions} positions"
        for layers, width, positions in zip(
            model.config.num_layers, model.hidden_dims, model.seq_lens, strict=True
        )
    ]
    return CARD.read_text(encoding="utf-8").format(
        weights=sum(parameter.numel() for parameter in model.parameters()),
        context=model.context_size,
        size=(folder / "model.safetensors").stat().st_size / 1e6,
        stages="two Transformers: " + "; ".join(stages),
        version=platform.python_version(),
        num_files=len(arguments["files"]),
        num_bytes=num_bytes,
        epochs=record["train"]["target_elements"] / num_bytes,
        seed=record["train"]["seed"],
        rows="\n".join(rows),
        held_out=total.num_bytes,
        bits=total.bits_per_byte,
        packed=8 * len(lzma.compress(texts, preset=9 | lzma.PRESET_EXTREME)) / len(texts),
        samples="\n\n".join(sample(model, *which) for which in SAMPLES.items()),
    )


def sample(model: MBLM, prompt: str, seed: int) -> str:
    """A command, and what it writes after its prompt."""
    wishes = {**SAMPLED, "seed": seed}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wishes.items())
    ids = model.generate(prompt, num_tokens_to_generate=300, enable_progress=False, **wishes)
    written = "\n".join(f"    {line}".rstrip() for line in to_text(ids).splitlines())
    command = f"mblm generate python --prompt {json.dumps(prompt)} --bytes 300 {options}"
    return f"`{command}`, the prompt before it:\n\n{written}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run that is trained already")
    parser.add_argument("--out", type=Path, default=PACKAGED_MODELS / "python")
    arguments = parser.parse_args()
    config = experiment()
    if arguments.run is None:
        torch.set_num_threads(1)
        train_mblm(config)
    run = arguments.run or find_run(f"{config.io.output_dir}/latest", holds="*.pth")
    write_model(run, arguments.out)


if __name__ == "__main__":
    main()
