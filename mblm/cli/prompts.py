"""What `mblm generate --prompts` does: prompts from a file of JSON lines, results to another."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mblm.cli.generate import how_many, read_file
from mblm.utils import interrupt
from mblm.utils.stream import Writable

if TYPE_CHECKING:
    from mblm import MBLM, Generation


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
        except (AttributeError, TypeError, ValueError):
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
