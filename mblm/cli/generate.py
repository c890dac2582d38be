"""What `mblm generate` and `mblm demo` do with bytes: read a prompt, stream what is generated."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mblm.model.find import CONFIG_FILE, RUN_CONFIG_FILE, WEIGHTS_FILE
from mblm.utils import interrupt
from mblm.utils.stream import ByteStreamer, Writable

if TYPE_CHECKING:
    import torch

    from mblm import MBLM
    from mblm.inference.guide import Constraint

DEFAULT_BYTES = 256


def read_file(file: Path) -> bytes:
    from mblm.utils.io import open_binary  # brings pydantic, which takes time

    with open_binary(file) as stream:
        return stream.read()


def constraint_of(regex: str | None, json_schema: Path | None) -> Constraint | None:
    """What the options say that is to be written."""
    if regex is not None:
        from mblm.constrain import Regex

        try:
            return Regex(os.fsencode(regex).decode(errors="surrogateescape"))  # in any locale
        except ValueError as error:
            raise ValueError(f"--regex: {error}") from error
    if json_schema is not None:
        from mblm.constrain import JsonSchema

        data = read_file(json_schema)
        try:
            return JsonSchema(data.decode())
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"--json-schema: {json_schema}: {error}") from error
    return None


def how_many(asked: int | None, prompt: int, context: int | None) -> int:
    """How many bytes to generate: those asked for, or as many as the context holds."""
    if asked is not None:
        return asked
    return DEFAULT_BYTES if context is None else min(DEFAULT_BYTES, max(context - prompt, 0))


def load(checkpoint: Path, config: Path | None, device: str | None) -> MBLM:
    """The model of a folder or a ``.pth`` file, in float32, on a device that works."""
    from mblm import MBLM
    from mblm.model.pretrained import load_checkpoint

    place = find_device(device)
    model = load_checkpoint(MBLM, checkpoint, config_file=config, map_location=place)
    return model.float()  # the fast way to generate, also from weights saved in bfloat16


def check_out(out: Path, checkpoint: Path, *inputs: Path | None) -> None:
    """Refuse to write where nothing can be written, or over what is read."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: {out} is a folder or in a folder that does not exist")
    of_model = [checkpoint, checkpoint / CONFIG_FILE, checkpoint / WEIGHTS_FILE]
    for file in (*of_model, checkpoint.with_name(RUN_CONFIG_FILE), *inputs):
        if out.exists() and file is not None and file.exists() and out.samefile(file):
            raise ValueError(f"--out: {out} is read by this command and would be lost")


def find_device(name: str | None) -> torch.device:
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
    model: MBLM,
    prompt: bytes,
    file: Writable | None = None,
    *,
    seed: int,
    **arguments: Any,
) -> int:
    """Generate to a file or standard output, then tell the speed; returns the exit status."""
    from mblm.inference.request import naming

    to_terminal = file is None and sys.stdout.isatty()
    streamer = ByteStreamer(
        file or (sys.stdout if to_terminal else sys.stdout.buffer), decode_utf8=to_terminal
    )
    start = time.perf_counter()
    with interrupt.raises(), naming(prime="--prompt", num_tokens_to_generate="--bytes"):
        generated = model.generate(prompt, streamer, seed=seed, **arguments)
    if streamer.reader_left:  # what is still buffered must not fail when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    seconds = time.perf_counter() - start
    count = int((generated[len(prompt) :] < 256).sum())  # other ids are no bytes
    facts = [
        f"{count} bytes in {seconds:.2f} s",
        f"{count / seconds:,.0f} bytes/s",
        f"seed {seed}",
    ]
    if len(generated) == model.max_length:
        facts.insert(1, f"which fill the context of {model.max_length}")
    typer.echo(("\n" if to_terminal else "") + ", ".join(facts), err=True)
    return 0
