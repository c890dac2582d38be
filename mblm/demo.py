"""A demonstration: a small model learns Python's standard library in minutes on a CPU."""

import math
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mblm.inference.prompt import to_text
from mblm.model.find import PACKAGED_MODELS
from mblm.model.mblm import MBLM
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.interrupt import TrainingInterrupted
from mblm.train.mblm import TrainEntryConfig, train_mblm
from mblm.train.plot import Curves, read_curves
from mblm.utils.say import say

# Tests, tables of data, and what others installed: little of it reads like a program.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
LEFT_OUT |= {"_bundled", "site-packages", "dist-packages"}
HELD_OUT = 20  # every 20th file is for validation

BATCH_SIZE = 2  # so few bytes are seen that steps count for more than smooth gradients
# A long patch: what a model learns first is how the last few bytes go on.
SEQ_LENS = [16, 32]
LENGTH = math.prod(SEQ_LENS)
VALIDATIONS = 2  # after the first step and the last
VALIDATION_BATCHES = 24
CALIBRATION_STEPS = 8
# How it samples: words get plausible, and runs of spaces still end, as at 0.6 they seldom do.
FILTER_THRES = 0.97
TEMPERATURE = 0.8

_BLOCK = {"attn_num_heads": 4, "attn_use_rot_embs": True}
EXPERIMENT: dict[str, dict[str, Any]] = {
    "params": {
        "input_seq_len": LENGTH,
        "num_tokens": 257,
        "pad_token_id": 256,
        "hidden_dims": [256, 128],
        "num_layers": [2, 3],
        "seq_lens": SEQ_LENS,
        "train_checkpoint_chunks": None,
        "block": [
            {**_BLOCK, "attn_head_dims": 64},
            {**_BLOCK, "attn_head_dims": 32, "pos_emb_type": "fixed"},
        ],
    },
    "train": {
        "target_elements_strategy": "sequence",
        "warmup_steps_perc": 0.05,
        "batch_size": BATCH_SIZE,
        "shuffle_train": True,
        "shuffle_eval": True,
        "max_eval_steps": VALIDATION_BATCHES,
        "learning_rate": 4e-3,
        "gradient_clipping": 1.0,
        "gradient_accumulate_every": 1,
    },
    "io": {
        "name_model": "demo",
        "dataset_id": "bytes",
        "num_models_to_save": 1,
        "validate_amount": VALIDATIONS,
        "log_train_loss_amount": 100,
    },
}


def show_packaged() -> None:
    """Let the model that comes with this package write a little."""
    model = MBLM.from_pretrained(PACKAGED_MODELS / "python").float()
    how: Any = {"num_tokens_to_generate": 160, "temperature": 0.7, "top_p": 0.95, "seed": 6}
    ids = model.generate("class ", enable_progress=False, **how)
    say(f"What the model `python` writes, which comes with this package:\n\n{to_text(ids)}\n")


def train_demo(seconds: float, out: Path, seed: int = 0) -> MBLM:
    """Train on the standard library's sources, tell the progress, and save the model.

    Args:
        seconds: How long to train, by the clock; how many steps that is, is measured first.
        out: Folder for the model, created if missing.
        seed: Seed of the weights and of the batches.

    Returns:
        The model, in evaluation mode.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"minutes: expected a positive number, got {seconds / 60}")
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    root = Path(sysconfig.get_path("stdlib"))
    _, curves = _train(root, CALIBRATION_STEPS, seed, is_calibration=True)
    step = BATCH_SIZE * LENGTH / median(speed for _, speed in curves.speed)
    # A validation batch takes about a third of a step.
    left = seconds - (time.monotonic() - begin) - VALIDATIONS * VALIDATION_BATCHES * step / 3
    steps = max(int(left / step), 1)
    few = "; too few to learn much, --minutes gives it more" if steps < 100 else ""
    say(
        f"Training on Python's standard library for {seconds / 60:g} minutes: {steps:,} steps, "
        f"{torch.get_num_threads()} threads{few}"
    )
    model, curves = _train(root, steps, seed)
    assert model is not None
    say(f"Bits per byte of files it has not seen: {min(bits for _, bits in curves.valid):.3f}")
    model.save_pretrained(out)
    return model.eval()


def find_sources(root: Path) -> tuple[list[str], list[str]]:
    """The sources below a folder, in an order that does not vary.

    Returns:
        Their names, relative to the folder: for training and for validation.
    """
    names = sorted(
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if not LEFT_OUT & set(file.relative_to(root).parts)
    )
    random.Random(0).shuffle(names)
    validation = names[::HELD_OUT]
    training = [name for number, name in enumerate(names) if number % HELD_OUT]
    for part in (training, validation):
        if sum((root / name).stat().st_size for name in part) < BATCH_SIZE * LENGTH:
            raise ValueError(f"{root}: no sources of the standard library, or too few, to train on")
    return training, validation


def _train(
    root: Path, steps: int, seed: int, *, is_calibration: bool = False
) -> tuple[MBLM | None, Curves]:
    """Train so many steps on what is below a folder; returns the best model and what was logged."""
    training, validation = find_sources(root)
    with tempfile.TemporaryDirectory() as folder:
        files = {"files": training, "valid_files": validation, "test_fraction": 0}
        data = {"dataset_dir": str(root), "dataset_args": {**files, "separator_id": ord("\n")}}
        length = {"target_elements": steps * BATCH_SIZE * LENGTH, "seed": seed}
        train = EXPERIMENT["train"] | length
        io = EXPERIMENT["io"] | data | {"output_dir": folder}
        config = TrainEntryConfig.model_validate({**EXPERIMENT, "train": train, "io": io})
        options = CoreTrainerOptions(
            display_progress=sys.stderr.isatty() and not is_calibration,
            announce=False,
            skip_validation=is_calibration,
        )
        try:
            train_mblm(config, options)
        except TrainingInterrupted:
            raise KeyboardInterrupt from None  # what it has saved goes, too
        (run,) = Path(folder).glob("demo_*")
        return None if is_calibration else MBLM.from_pretrained(run), read_curves(run)
