"""What `mblm generate` and `mblm demo` do with bytes: read prompts, write what is generated."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mblm.model.find import CONFIG_FILE, RUN_CONFIG_FILE, WEIGHTS_FILE
from mblm.utils import interrupt
from mblm.utils.naming import naming, naming_file
from mblm.utils.stream import ByteStreamer, Writable

if TYPE_CHECKING:
    from mblm import MBLM, Generation
    from mblm.inference.guide import Constraint

DEFAULT_BYTES = 256


def read_file(file: Path) -> bytes:
    from mblm.utils.io import open_binary  # brings pydantic, which takes time

    with open_binary(file) as read:
        return read(-1)


def constraint_of(regex: str | None, json_schema: Path | None) -> Constraint | None:
    """What the options say that is to be written."""
    if regex is not None:
        from mblm.constrain import Regex

        with naming(pattern="--regex"):
            return Regex(os.fsencode(regex).decode(errors="surrogateescape"))  # in any locale
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
    from mblm.utils.cuda import find_device

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


class LateFile:
    """A binary file that the first write or flush opens, and so empties: after all checks."""

    mode = "wb"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def write(self, data: bytes) -> int:
        self.flush()
        with naming_file(self._path):
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
    to_terminal = file is None and sys.stdout.isatty()
    streamer = ByteStreamer(
        file or (sys.stdout if to_terminal else sys.stdout.buffer), decode_utf8=to_terminal
    )
    start = time.perf_counter()
    with interrupt.raises():
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
        what = "which fill" if len(generated) > len(prompt) else "as the prompt fills"
        facts.insert(1, f"{what} the context of {model.max_length}")
    typer.echo(("\n" if to_terminal else "") + ", ".join(facts), err=True)
    return 0


def generate_all(
    model: MBLM,
    prompts: list[bytes],
    out: Writable,
    num_bytes: int | None,
    *,
    seed: int,
    **arguments: Any,
) -> int:
    """Generate after each prompt, write each result when it is over; returns the exit status.

    The n-th prompt, counted from 0, has the seed ``seed + n``.
    """
    start = time.perf_counter()
    with interrupt.raises():
        results = model.generate_batch(
            prompts,
            max_bytes=[how_many(num_bytes, len(prompt), model.max_length) for prompt in prompts],
            seeds=range(seed, seed + len(prompts)),
            on_result=lambda index, result: out.write(line_of(index, prompts[index], result)),
            enable_progress=sys.stderr.isatty(),
            **arguments,
        )
    seconds = time.perf_counter() - start
    out.write(b"")  # of no prompts, an empty file
    count = sum(len(result.data) for result in results)
    facts = [
        f"{len(results)} prompts",
        f"{count} bytes in {seconds:.2f} s",
        f"{count / seconds:,.0f} bytes/s",
        f"seeds from {seed}",
    ]
    typer.echo(", ".join(facts), err=True)
    return 0


def read_prompts(file: Path) -> list[bytes]:
    """The prompts of a file, one JSON object a line: ``prompt``, text, or ``prompt_base64``."""
    prompts: list[bytes] = []
    for number, line in enumerate(read_file(file).splitlines(), 1):
        try:
            ((key, value),) = json.loads(line).items()
            if key == "prompt":
                prompts.append(value.encode())
            elif key == "prompt_base64":
                prompts.append(base64.b64decode(value, validate=True))
            else:
                raise ValueError
        except (AttributeError, TypeError, ValueError, RecursionError):
            shown = repr(line[:60])[1:]
            raise ValueError(
                f'{file}, line {number}: expected {{"prompt": "text"}} or '
                f'{{"prompt_base64": "…"}}, got {shown}'
            ) from None
    return prompts


def line_of(index: int, prompt: bytes, result: Generation) -> bytes:
    """A result as JSON; what is no UTF-8 is in base64."""
    named = {
        "index": index,
        **_as_json("prompt", prompt),
        **_as_json("text", result.data),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
    }
    return json.dumps(named).encode() + b"\n"


def _as_json(name: str, data: bytes) -> dict[str, str]:
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}
