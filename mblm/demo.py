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

from mblm.data.dataset.byte_files import ByteFiles
from mblm.data.types import BatchWithLossMask, ModelMode
from mblm.inference.prompt import to_text
from mblm.model.config import MBLMModelConfig
from mblm.model.find import PACKAGED_MODELS
from mblm.model.mblm import MBLM
from mblm.model.transformer import TransformerBlock
from mblm.train.core.interrupt import TrainingInterrupted
from mblm.train.core.trainer import CoreTrainerOptions
from mblm.train.mblm import MegabyteTrainer, TrainEntryConfig
from mblm.train.plot import Curves, read_curves
from mblm.utils.distributed import ElasticRunVars

# Tests, tables of data, and what others installed: little of it reads like a program.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "_bundled",
    "site-packages",
    "dist-packages",
}
HELD_OUT = 20  # every 20th file is for validation

# A long patch: what a model learns first is how the last few bytes go on.
SEQ_LENS = [16, 32]
BATCH_SIZE = 2  # so few bytes are seen that steps count for more than smooth gradients
LEARNING_RATE = 4e-3
VALIDATIONS = 2  # after the first step and the last
VALIDATION_BATCHES = 24
CALIBRATION_STEPS = 8
FIRST_SAMPLE = 30  # seconds of training after which it writes something
# How it samples: words get plausible, and runs of spaces still end, as at 0.6 they seldom do.
FILTER_THRES = 0.97
TEMPERATURE = 0.8


def demo_config() -> MBLMModelConfig:
    """A Transformer over patches of 32 bytes, above a Transformer over their bytes."""
    return MBLMModelConfig(
        num_tokens=257,  # the bytes and the padding
        pad_token_id=256,
        hidden_dims=[256, 128],
        num_layers=[2, 3],
        seq_lens=SEQ_LENS,
        train_checkpoint_chunks=None,
        block=[
            TransformerBlock(attn_head_dims=64, attn_num_heads=4, attn_use_rot_embs=True),
            TransformerBlock(
                attn_head_dims=32, attn_num_heads=4, attn_use_rot_embs=True, pos_emb_type="fixed"
            ),
        ],
    )


def show_packaged() -> None:
    """Let the model that comes with this package write a little."""
    model = MBLM.from_pretrained(PACKAGED_MODELS / "python").float()
    title = "What the model `python` writes, which comes with this package"
    _show(model, title, "class ", temperature=0.7, top_p=0.95, seed=6)


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
    sources = find_sources(root)
    with tempfile.TemporaryDirectory() as folder:
        calibration = _experiment(f"{folder}/calibration", root, sources, CALIBRATION_STEPS, seed)
        _, curves = _train(calibration, is_calibration=True)
        step = BATCH_SIZE * math.prod(SEQ_LENS) / median(speed for _, speed in curves.speed)
        # A validation batch takes about a third of a step.
        left = seconds - (time.monotonic() - begin) - VALIDATIONS * VALIDATION_BATCHES * step / 3
        steps = max(int(left / step), 1)
        _say(
            f"Training {sum(p.numel() for p in MBLM(demo_config()).parameters()):,} weights on "
            f"Python's standard library for {seconds / 60:g} minutes: {steps:,} steps, "
            f"{torch.get_num_threads()} threads"
        )
        model, curves = _train(_experiment(f"{folder}/run", root, sources, steps, seed))
    best = min(bits for _, bits in curves.valid)
    _say(f"Bits per byte of files it has not seen: {best:.3f}")
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
        if sum((root / name).stat().st_size for name in part) < BATCH_SIZE * math.prod(SEQ_LENS):
            raise ValueError(f"{root}: no sources of the standard library, or too few, to train on")
    return training, validation


def _experiment(
    folder: str, root: Path, sources: tuple[list[str], list[str]], steps: int, seed: int
) -> TrainEntryConfig:
    """An experiment of so many steps; its run is written below ``folder``."""
    training, validation = sources
    length = math.prod(SEQ_LENS)
    return TrainEntryConfig.model_validate(
        {
            "params": {**demo_config().model_dump(), "input_seq_len": length},
            "train": {
                "target_elements": steps * BATCH_SIZE * length,
                "target_elements_strategy": "sequence",
                "warmup_steps_perc": 0.05,
                "batch_size": BATCH_SIZE,
                "shuffle_train": True,
                "shuffle_eval": True,
                "max_eval_steps": VALIDATION_BATCHES,
                "learning_rate": LEARNING_RATE,
                "gradient_clipping": 1.0,
                "gradient_accumulate_every": 1,
                "seed": seed,
            },
            "io": {
                "name_model": "demo",
                "output_dir": folder,
                "dataset_dir": str(root),
                "dataset_id": "bytes",
                "dataset_args": {"files": training, "valid_files": validation, "separator_id": 10},
                "num_models_to_save": 1,
                "validate_amount": VALIDATIONS,
                "log_train_loss_amount": 100,
            },
        }
    )


def _train(config: TrainEntryConfig, *, is_calibration: bool = False) -> tuple[MBLM, Curves]:
    """Run an experiment; returns its best model and what it has logged."""
    training, validation = (
        ByteFiles.from_train_entry_config(config, mode, worker_id=0, num_workers=1)
        for mode in (ModelMode.TRAIN, ModelMode.VALID)
    )
    options = CoreTrainerOptions(
        display_progress=sys.stderr.isatty() and not is_calibration,
        announce=False,
        skip_validation=is_calibration,
    )
    run_vars = ElasticRunVars(local_rank=0, world_size=1, is_cuda=torch.cuda.is_available())
    trainer = (MegabyteTrainer if is_calibration else _WritesEarly)(config, run_vars, options)
    try:
        model = trainer.train(training, validation)
    except TrainingInterrupted:
        raise KeyboardInterrupt from None  # what it has saved goes, too
    assert model is not None  # as the type allows for trainers that make none
    (run,) = Path(config.io.output_dir).glob("demo_*")
    return model, read_curves(run)


class _WritesEarly(MegabyteTrainer):
    """Shows early what its model writes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.write_at = time.monotonic() + FIRST_SAMPLE

    def model_forward(self, model: MBLM, batch: BatchWithLossMask, device: Any) -> torch.Tensor:
        if model.training and time.monotonic() >= self.write_at:
            self.write_at = math.inf
            model.eval()
            _show(
                model,
                f"What it writes after {FIRST_SAMPLE:g} seconds, and goes on to improve",
                "def ",
                temperature=TEMPERATURE,
                filter_thres=FILTER_THRES,
                seed=0,
            )
            model.train()
        return super().model_forward(model, batch, device)


def _show(model: MBLM, title: str, prompt: str, **wishes: Any) -> None:
    """Let a model write a little, below a title."""
    ids = model.generate(prompt, num_tokens_to_generate=160, enable_progress=False, **wishes)
    _say(f"{title}:\n\n{to_text(ids[ids < 256])}\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
