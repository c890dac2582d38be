"""A demonstration: a small model learns Python's standard library in minutes on a CPU."""

import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mblm.model.config import MBLMModelConfig
from mblm.model.mblm import MBLM
from mblm.model.transformer import TransformerBlock

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
VALIDATION_SEQUENCES = 64

# A long patch: what a model learns first is how the last few bytes go on.
SEQ_LENS = [16, 32]
BATCH_SIZE = 2  # so few bytes are seen that steps count for more than smooth gradients
LEARNING_RATE = 4e-3
WARMUP = 0.05  # of the time
FINAL_RATE = 0.05  # of the learning rate
CLIPPING = 1.0
# How it samples: words get plausible, and runs of spaces still end, as at 0.6 they seldom do.
FILTER_THRES = 0.97
TEMPERATURE = 0.8
SECONDS_PER_LINE = 10  # where there is no terminal for a bar


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


def train_demo(seconds: float, out: Path, seed: int = 0) -> MBLM:
    """Train on the standard library's sources, tell the progress, and save the model.

    Args:
        seconds: How long to train, by the clock.
        out: Folder for the model, created if missing.
        seed: Seed of the weights and of the batches.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: ``seconds`` is not a positive number, or there are no sources.
        OSError: ``out`` cannot be a folder.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"minutes: expected a positive number, got {seconds / 60}")
    out.mkdir(parents=True, exist_ok=True)
    training, validation = read_sources(Path(sysconfig.get_path("stdlib")))
    torch.manual_seed(seed)
    model = MBLM(demo_config())
    _say(
        f"Training {sum(p.numel() for p in model.parameters()):,} weights on {len(training):,} "
        f"bytes of Python for {seconds / 60:g} minutes, {torch.get_num_threads()} threads"
    )
    _train(model, training, seconds, torch.Generator().manual_seed(seed))
    model.eval()
    _say(f"Bits per byte of files it has not seen: {measure(model, validation):.3f}")
    model.save_pretrained(out)
    return model


def read_sources(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The sources below a folder, in an order that does not vary: training and validation bytes.

    Returns:
        Two tensors of token ids ``(L,)``, uint8; the second from files of its own.

    Raises:
        ValueError: There are too few sources.
    """
    files = sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))
    random.Random(0).shuffle(files)
    parts = [b"\n".join(f.read_bytes() for f in files[i::HELD_OUT]) for i in range(HELD_OUT)]
    length = math.prod(SEQ_LENS)
    if min(map(len, parts)) <= length:
        raise ValueError(f"{root}: no sources of the standard library, or too few, to train on")
    validation, *training = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return torch.cat(training), validation


@torch.inference_mode()
def measure(model: MBLM, validation: torch.Tensor) -> float:
    """Bits per byte of sequences spread evenly over the validation bytes ``(L,)``."""
    length = math.prod(SEQ_LENS)
    starts = torch.linspace(0, len(validation) - length, VALIDATION_SEQUENCES).long()
    losses = [model(validation[s : s + length][None]).item() for s in starts]
    return sum(losses) / len(losses) / math.log(2)


def _train(model: MBLM, training: torch.Tensor, seconds: float, generator: torch.Generator) -> None:
    """Adam on random sequences; the learning rate warms up and decays by the time used."""
    length = math.prod(SEQ_LENS)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    with _Progress(seconds) as progress:
        while (used := progress.used()) < 1:
            decayed = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * used)) / 2
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(used / WARMUP, decayed)
            starts = torch.randint(len(training) - length, (BATCH_SIZE, 1), generator=generator)
            loss = model(training[starts + torch.arange(length)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            optimizer.step()
            progress.show(loss.item() / math.log(2), BATCH_SIZE * length)


class _Progress:
    """A bar on a terminal, elsewhere a line every ten seconds, for work of a given time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._next_line = 0.0
        self._bytes = 0
        self._bits: float | None = None
        self._bar = tqdm(total=1.0, bar_format="{bar}", disable=not self._is_terminal)

    def used(self) -> float:
        """The fraction of the time that is used."""
        return (time.monotonic() - self._start) / self._seconds

    def show(self, bits_per_byte: float, num_bytes: int) -> None:
        """Show a step's loss, smoothed, the speed and the time left."""
        previous = bits_per_byte if self._bits is None else self._bits
        self._bits = 0.95 * previous + 0.05 * bits_per_byte
        self._bytes += num_bytes
        used = min(self.used(), 1.0)
        elapsed = time.monotonic() - self._start
        speed = self._bytes / elapsed
        left = f"{math.ceil((1 - used) * self._seconds)} s left"
        facts = f"{self._bits:.2f} bits per byte, {speed:,.0f} bytes/s, {left}"
        if self._is_terminal:
            self._bar.bar_format = f"{used:4.0%} |{{bar}}| {facts}"
            self._bar.update(used - self._bar.n)
        elif elapsed >= self._next_line or used == 1:
            _say(f"{used:4.0%} {facts}")
            self._next_line = elapsed + SECONDS_PER_LINE

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
