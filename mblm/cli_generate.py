"""What `mblm generate` and `mblm demo` do with bytes: read a prompt, stream what is generated."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import mblm
from mblm.utils.stream import ByteStreamer, Writable

if TYPE_CHECKING:
    import torch


def read_prompt(file: Path) -> bytes:
    return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()


def check_out(out: Path, checkpoint: str, *inputs: Path | None) -> None:
    """Refuse to write where nothing can be written, or over what is read."""
    from mblm.model.pretrained import CONFIG_FILE, WEIGHTS_FILE

    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: {out} is a folder or in a folder that does not exist")
    of_model = Path(checkpoint)
    of_model_files = (of_model, of_model / CONFIG_FILE, of_model / WEIGHTS_FILE)
    for file in (*of_model_files, of_model.with_name("config.yaml"), *inputs):
        if out.exists() and file is not None and file.exists() and out.samefile(file):
            raise ValueError(f"--out: {out} is read by this command and would be lost")


def find_device(name: str | None) -> "torch.device":
    """A device that works, by its name."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used: {error}") from error
    return device


class LateFile:
    """A binary file that the first write or flush opens, and so empties: after all checks."""

    mode = "wb"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def write(self, data: bytes) -> int:
        self.flush()
        return self._file.write(data)

    def flush(self) -> None:
        if self._file is None:
            self._file = self._path.open("wb", buffering=0)


def stream(
    model: mblm.MBLM,
    prompt: bytes,
    file: Writable | None = None,
    *,
    seed: int,
    **arguments: Any,
) -> int:
    """Generate to a file or standard output, then tell the speed; returns the exit status."""
    import torch

    to_terminal = file is None and sys.stdout.isatty()
    if to_terminal:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    streamer = ByteStreamer(
        file or (sys.stdout if to_terminal else sys.stdout.buffer), decode_utf8=to_terminal
    )
    prime = torch.tensor(list(prompt), dtype=torch.long)
    start = time.perf_counter()
    generated = model.generate(prime, streamer, seed=seed, **arguments)
    if streamer.reader_left:  # what is still buffered must not fail when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    seconds = time.perf_counter() - start
    count = len(generated) - len(prime)
    newline = "\n" if to_terminal else ""
    typer.echo(
        f"{newline}{count} bytes in {seconds:.2f} s, {count / seconds:,.0f} bytes/s, seed {seed}",
        err=True,
    )
    return 0
