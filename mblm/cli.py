"""The command line: `mblm generate`, `mblm info` and `mblm demo`."""

import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, SupportsIndex

import typer

import mblm
from mblm.utils.stream import ByteStreamer, Writable

if TYPE_CHECKING:
    import torch

OPTIONAL_PACKAGES = (
    "mamba-ssm",
    "causal-conv1d",
    "huggingface_hub",
    "Pillow",
    "filelock",
    "matplotlib",
    "tensorboard",
)

# Typer's own usage errors; their class is in click or in typer's copy of it.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, context_settings={"max_content_width": 100}
)


def main() -> NoReturn:
    """Run the command line and exit; expected errors are one line on standard error."""
    try:
        status = app(prog_name="mblm", standalone_mode=False)
    except UsageError as error:
        status = _fail(f"{error.format_message()} (try --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Multiscale Byte Language Models: hierarchical models of bytes.

    \b
    Examples:
      mblm demo                                      train a small model, let it write Python
      mblm generate mblm-demo --prompt "class "      go on writing from a saved model
      mblm info                                      what is installed, compiled and missing
    """
    if version:
        typer.echo(f"mblm {mblm.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A folder from save_pretrained, the id of a model on the hub, or a .pth file "
            "with its config.yaml beside it."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="What comes before the bytes.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="The same from a file; - is standard input.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file. [default: standard output]")
    ] = None,
    num_bytes: Annotated[
        int, typer.Option("--bytes", min=0, help="How many bytes to generate.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits: below 1, likely bytes get likelier.")
    ] = 1.0,
    filter_thres: Annotated[
        float,
        typer.Option(help="Sample from the top 1 - F of the vocabulary; 1 takes the likeliest."),
    ] = 0.9,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest bytes that together reach this probability, instead "
            "of what --filter-thres keeps."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same bytes. [default: a new one]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; may be given several times.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1. [default: cuda if available]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The config.yaml of a .pth file, if not beside it.")
    ] = None,
) -> int:
    """Generate bytes with a saved model, written as they come.

    The prompt is not repeated. A last line on standard error tells the speed and the seed.

    \b
    Examples:
      mblm generate mblm-demo --prompt "def "
      mblm generate mblm-demo --prompt-file story.txt --bytes 1000 --out more.txt
      mblm generate run/model_top0.pth --temperature 0.7 --stop END --seed 1
      mblm generate mblm-demo --filter-thres 1 | head -c 100
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("pass at most one of --prompt and --prompt-file")
    from mblm.model.pretrained import load_checkpoint

    try:
        prime = os.fsencode(prompt or "") if prompt_file is None else _read_prompt(prompt_file)
        if out is not None:
            _check_out(out, checkpoint, prompt_file, config)
        model = load_checkpoint(
            mblm.MBLM, checkpoint, config_file=config, map_location=_find_device(device)
        )
        return _stream(
            model,
            prime,
            None if out is None else _LateFile(out),
            num_tokens_to_generate=num_bytes,
            temperature=temperature,
            filter_thres=filter_thres,
            top_p=top_p,
            seed=secrets.randbits(32) if seed is None else seed,
            stop=[os.fsencode(text) for text in stop or ()],
        )
    except (OSError, ValueError) as error:
        return _fail(_describe(error))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, compiled and missing, and how to get it."""
    import torch

    from mblm.utils.cuda import cuda_properties

    build = mblm.build_info()
    missing = build.pop("missing")
    cuda = cuda_properties()
    facts = {
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
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long to train, by the clock.")] = 2.0,
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

    \b
    Examples:
      mblm demo
      mblm demo --minutes 10 --out bigger --prompt "class "
    """
    from mblm.demo import FILTER_THRES, TEMPERATURE, train_demo

    try:
        model = train_demo(minutes * 60, out, seed)
        typer.echo(f"Saved the model in {out}. What it writes after the prompt:\n", err=True)
        typer.echo(prompt, nl=False)
        return _stream(
            model,
            os.fsencode(prompt),
            num_tokens_to_generate=num_bytes,
            filter_thres=FILTER_THRES,
            temperature=TEMPERATURE,
            seed=seed,
        )
    except (OSError, ValueError) as error:
        return _fail(_describe(error))


# -- Bytes in and out --------------------------------------------------------------------------


def _read_prompt(file: Path) -> bytes:
    return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()


def _check_out(out: Path, checkpoint: str, *inputs: Path | None) -> None:
    """Refuse to write where nothing can be written, or over what is read."""
    from mblm.model.pretrained import CONFIG_FILE, WEIGHTS_FILE

    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: {out} is a folder or in a folder that does not exist")
    of_model = Path(checkpoint)
    of_model_files = (of_model, of_model / CONFIG_FILE, of_model / WEIGHTS_FILE)
    for file in (*of_model_files, of_model.with_name("config.yaml"), *inputs):
        if out.exists() and file is not None and file.exists() and out.samefile(file):
            raise ValueError(f"--out: {out} is read by this command and would be lost")


def _find_device(name: str | None) -> "torch.device":
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


class _LateFile:
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


class _Streamer(ByteStreamer):
    """Remembers whether its reader left, which ends generation without an error."""

    reader_left = False

    def write(self, int_byte: SupportsIndex) -> None:
        try:
            super().write(int_byte)
        except BrokenPipeError:
            self.reader_left = True
            raise


def _stream(
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
    streamer = _Streamer(
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


# -- What is said ------------------------------------------------------------------------------


def _fail(message: str, status: int = 1) -> int:
    typer.echo(f"mblm: error: {' '.join(message.split())}", err=True)
    return status


def _describe(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).splitlines()  # pydantic adds the address of a page to each of its own
    return " ".join(line for line in lines if "errors.pydantic.dev" not in line)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as aligned lines; a nested dictionary is indented."""
    width = max(map(len, facts)) + 2
    lines = []
    for name, value in facts.items():
        name = name.replace("_", " ") if not indent else name
        if isinstance(value, dict):
            lines += [name, *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            for number, item in enumerate(value or ["none"]):
                lines.append(f"{indent}{'' if number else name:{width}}{item}")
        else:
            if value is None or isinstance(value, bool):
                value = {True: "yes", False: "no", None: "-"}[value]
            lines.append(f"{indent}{name:{width}}{value}")
    return lines
