"""`mblm generate` and `mblm demo`: read prompts, write what is generated."""

import base64
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mblm.cli.options import Device, Imports, Model, RunConfig, check_out, load
from mblm.model.find import find_model
from mblm.utils import interrupt
from mblm.utils.naming import naming, naming_file
from mblm.utils.say import say
from mblm.utils.stream import ByteStreamer, Writable

if TYPE_CHECKING:
    from mblm import MBLM, Generation
    from mblm.inference.guide import Constraint

DEFAULT_BYTES = 256


def read_file(file: Path) -> bytes:
    from mblm.utils.io import open_binary  # brings pydantic, which takes time

    with open_binary(file) as read:
        return read(-1)


def constraint_of(regex: str | None, json_schema: Path | None) -> "Constraint | None":
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
    model: "MBLM",
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
    say(("\n" if to_terminal else "") + ", ".join(facts))
    return 0


def generate_all(
    model: "MBLM",
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
    say(", ".join(facts))
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


def line_of(index: int, prompt: bytes, result: "Generation") -> bytes:
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


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="What comes before the bytes.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="The same from a file; - is standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Many prompts, lines such as {"prompt": "The"}; results are lines of --out, '
            "written as they come."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file. [default: standard output]")
    ] = None,
    num_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            min=0,
            help="How many bytes to generate. [default: 256, or as many as the context holds]",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="Divides the logits: below 1, likely bytes get likelier; 0 takes the likeliest."
        ),
    ] = 1.0,
    filter_thres: Annotated[
        float,
        typer.Option(
            metavar="F", help="Sample from the top 1 - F of the vocabulary; 1 takes the likeliest."
        ),
    ] = 0.9,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many likeliest bytes, as the next two.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest bytes that together reach this probability, instead "
            "of what --filter-thres keeps."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample from bytes at least this share as likely as the likeliest."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same bytes. [default: a new one]")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End after this text; may be given several times."),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Write what this regular expression matches."),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="Write JSON that the schema in this file describes.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="ngram", help="Propose what came before: the same text, sooner."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|int8",
            help="Read the weights rounded to this type: faster on a CPU, not quite the model.",
        ),
    ] = "float32",
    device: Device = None,
    config: RunConfig = None,
    imports: Imports = None,
) -> int:
    """Generate bytes with a saved model, written as they come.

    The prompt is not repeated. A last line on standard error tells the speed and the seed.

    \b
    Examples:
      mblm generate python --prompt "def "
      mblm generate mblm-demo --prompt-file story.txt --bytes 1000 --out more.txt
      mblm generate runs/latest --temperature 0.7 --stop END --seed 1
      mblm generate mblm-demo --regex "[a-z_]+ = [0-9]+" --min-p 0.05
      mblm generate run/model_top1.pth --filter-thres 1 | head -c 100
      mblm generate mblm-demo --weights int8 --bytes 10000 --out much.txt
      mblm generate mblm-demo --prompts many.jsonl --out results.jsonl
    """
    if sum(given is not None for given in (prompt, prompt_file, prompts)) > 1:
        raise typer.BadParameter("pass at most one of --prompt, --prompt-file and --prompts")
    if prompts is not None and out is None:
        raise typer.BadParameter("--prompts needs --out")
    if regex is not None and json_schema is not None:
        raise typer.BadParameter("pass at most one of --regex and --json-schema")
    constraint = constraint_of(regex, json_schema)
    checkpoint = find_model(model)
    prime = os.fsencode(prompt or "") if prompt_file is None else read_file(prompt_file)
    primes = [] if prompts is None else read_prompts(prompts)
    if out is not None:
        check_out(out, checkpoint, prompt_file, prompts, config, json_schema)
    loaded = load(checkpoint, config, device)
    file = None if out is None else LateFile(out)
    wishes: dict[str, Any] = {
        "temperature": temperature,
        "filter_thres": filter_thres,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "constraint": constraint,
        "draft": draft,
        "seed": secrets.randbits(32) if seed is None else seed,
        "stop": [os.fsencode(text) for text in stop or ()],
        "weights": weights,
    }
    names = {"constraint": "--json-schema" if regex is None else "--regex"}
    with naming(**names, **({} if prompt_file is None else {"prime": "--prompt-file"})):
        if file is not None and prompts is not None:
            return generate_all(loaded, primes, file, num_bytes, **wishes)
        count = how_many(num_bytes, len(prime), loaded.max_length)
        return stream(loaded, prime, file, num_tokens_to_generate=count, **wishes)


def demo(
    minutes: Annotated[
        float, typer.Option(min=0.01, help="How long to train, by the clock.")
    ] = 2.0,
    out: Annotated[
        Path, typer.Option(help="Folder of the model; one that is there is replaced.")
    ] = Path("mblm-demo"),
    num_bytes: Annotated[
        int, typer.Option("--bytes", min=0, help="How many bytes to generate.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and sampling.")] = 0,
    prompt: Annotated[
        str, typer.Option(help="What comes before the bytes.")
    ] = "    def __init__(self, ",
) -> int:
    """Train a small model on the sources of Python's standard library, and let it write.

    The model `python`, which comes with this package, writes first.

    \b
    Examples:
      mblm demo
      mblm demo --minutes 10 --out bigger --prompt "class "
    """
    from mblm.demo import FILTER_THRES, TEMPERATURE, show_packaged, train_demo

    with interrupt.raises():
        show_packaged()
        model = train_demo(minutes * 60, out, seed)
    say(f"Saved the model in {out}. What it writes after the prompt:\n")
    typer.echo(prompt, nl=False)
    return stream(
        model,
        os.fsencode(prompt),
        num_tokens_to_generate=num_bytes,
        filter_thres=FILTER_THRES,
        temperature=TEMPERATURE,
        seed=seed,
    )
