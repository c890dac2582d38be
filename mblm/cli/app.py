"""The command line, `mblm …`: what its commands take; the work is done elsewhere."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

import mblm
from mblm.cli.generate import check_out, load, stream
from mblm.cli.generate_command import generate
from mblm.cli.info import collect_facts, describe_models, format_facts
from mblm.cli.options import Device, Imports, Model, RunConfig, shown_name
from mblm.model.find import find_model, find_run
from mblm.utils import interrupt
from mblm.utils.atomic import atomic_write
from mblm.utils.naming import naming

# Typer's own usage errors; their class is in click or in typer's copy of it.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)


class _Command(typer.core.TyperCommand):
    """A command whose errors call arguments as its options are called."""

    def invoke(self, context: Any) -> Any:
        names = dict(prime="--prompt", num_tokens_to_generate="--bytes", seeds="--seed")
        options = {p.name: p.opts[0] for p in self.params if p.opts[0].startswith("--")}
        with naming(**names, **options):
            return super().invoke(context)


command = partial(app.command, cls=_Command)


def run() -> int:
    """Run the command that the arguments name; returns the exit status."""
    try:
        status: int | None = app(prog_name="mblm", standalone_mode=False)
        sys.stdout.flush()  # which may fail: the disk is full
    except UsageError as error:
        return _fail(f"{' '.join(error.format_message().split())} (try --help)", 2)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        from mblm.utils.errors import describe

        return _fail(describe(error))
    except typer.Abort:
        raise KeyboardInterrupt from None
    return status or 0


def _fail(message: str, status: int = 1) -> int:
    typer.echo(f"mblm: error: {message}", err=True)
    return status


command()(generate)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Multiscale Byte Language Models: hierarchical models of bytes.

    \b
    Examples:
      mblm generate python --prompt "def "           write with the model that comes along
      mblm demo                                      train a small model, let it write Python
      mblm generate mblm-demo --prompt "class "      go on writing from a saved model
      mblm train configs/first.yaml                  train from a configuration
      mblm generate latest --prompt "The "           write with what was trained last
      mblm eval latest book.txt                      bits per byte of files
      mblm show latest book.txt                      which bytes surprise it
      mblm pack posts.jsonl.zst --out packed         make documents fast to train on
      mblm info                                      what is installed, compiled and missing
    """
    if version:
        typer.echo(f"mblm {mblm.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@command()
def train(
    config: Annotated[Path, typer.Argument(help="The experiment's YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Replace a field, such as train.batch_size=4; may be given several times.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|latest|PATH",
            help="Go on from the last run of that name (auto: or begin one), or from a run's "
            "folder, its config.yaml, a training state in it, or a .pth file, which holds the "
            "weights alone.",
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Processes here. [default: the number of GPUs, or 1]")
    ] = None,
    nnodes: Annotated[int, typer.Option(help="Machines that take part.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(help="This machine's number, from 0. [default: as they arrive]")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where the machines meet, on one of them."),
    ] = None,
    profile: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Profile N steps: a trace, and a GPU's memory."),
    ] = 0,
    imports: Imports = None,
) -> None:
    """Train a model as a configuration says, in one process or many.

    A run can be stopped at any time, by Ctrl-C too, and resumed.

    \b
    Examples:
      mblm train configs/small_2d_st.yaml --set io.dataset_dir=my-texts
      mblm train experiment.yaml --nproc 4 --set train.batch_size=4
      mblm train experiment.yaml --resume latest
      mblm train experiment.yaml --import my_blocks
      mblm train experiment.yaml --nnodes 2 --node-rank 0 --rdzv-endpoint first:29400
    """
    from mblm.train.launch import launch

    launch(
        config,
        settings=settings or (),
        resume=resume,
        imports=imports or (),
        nproc=nproc,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
        profile=profile,
    )


@command("eval")
def evaluate(
    model: Model,
    files: Annotated[
        list[Path], typer.Argument(help="The files, of any length; - is standard input.")
    ],
    length: Annotated[
        int | None,
        typer.Option(
            help="Bytes of a window. [default: the model's context; none for a model that takes "
            "any length by a Mamba]"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="How many of them are scored. [default: half, after a half to go by]"),
    ] = None,
    batch_bytes: Annotated[
        int, typer.Option(help="Bytes that are taken in together: memory follows them.")
    ] = 1 << 16,
    device: Device = None,
    config: RunConfig = None,
    imports: Imports = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell how well a model predicts files: bits per byte of each, and in all.

    A file longer than the context is cut into windows that overlap: each byte is scored once, with
    at least length - stride bytes before it except where the file begins. Bytes equal to the
    model's padding, for which it has no loss, do not count.

    \b
    Examples:
      mblm eval mblm-demo program.py
      mblm eval latest *.txt --stride 256 --json
      tail -c 100000 book.txt | mblm eval latest -
    """
    from mblm.cli.evaluate import check_files, evaluate_files, format_scores

    check_files(files)
    loaded = load(find_model(model), config, device)
    scores = evaluate_files(loaded, files, length, stride, batch_bytes)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        typer.echo(format_scores(scores))
        typer.echo(f"{scores['bytes_per_second']:,.0f} bytes/s", err=True)


@command()
def show(
    model: Model,
    file: Annotated[Path, typer.Argument(help="The text, any bytes; - is standard input.")],
    out: Annotated[
        Path, typer.Option(help="The page, .html, or a picture of its beginning, .png or .svg.")
    ] = Path("surprise.html"),
    device: Device = None,
    config: RunConfig = None,
    imports: Imports = None,
) -> None:
    """Show which bytes of a text surprise a model, on a page or in a picture.

    The page is one file that needs nothing but a browser: the text colored by the bits that each
    byte takes, the likeliest bytes wherever the pointer is, and bits by place in a patch.

    \b
    Examples:
      mblm show mblm-demo program.py
      mblm show latest photo.jpg --out photo.html
      head -c 2000 book.txt | mblm show latest - --out book.png
    """
    from mblm.cli.show import measure_file, read_text, writer_for

    write = writer_for(out)
    checkpoint = find_model(model)
    data = read_text(file)
    check_out(out, checkpoint, file, config)
    loaded = load(checkpoint, config, device)
    with interrupt.raises(), atomic_write(out) as stream:
        surprise = measure_file(loaded, data)
        write(surprise, "standard input" if str(file) == "-" else shown_name(file), stream)
    typer.echo(f"Wrote {out}: {surprise}")


@command()
def pack(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files, folders, globs, URLs, or datasets of the hub, owner/name or "
            "owner/name:config, of which the split train is taken.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    field: Annotated[
        str, typer.Option(help="The column of .jsonl, .csv, .tsv and .parquet that holds the text.")
    ] = "text",
    valid: Annotated[
        float,
        typer.Option(help="Share of the bytes, in whole documents, to validate on; 0: none."),
    ] = 0.01,
    whole: Annotated[
        bool, typer.Option("--whole", help="Take tables as one document each, as other files.")
    ] = False,
) -> None:
    """Pack documents into a folder that training reads fast, as its io.dataset_dir.

    A row of a table is a document, and so is any other file. Files may be compressed: .gz, .bz2,
    .xz, .zst. Order and bytes are kept. Packing ends with the whole folder or with none.

    \b
    Examples:
      mblm pack my-texts --out packed
      mblm pack posts.jsonl.gz books/*.parquet --field body --out packed --valid 0.005
      mblm pack HuggingFaceFW/fineweb-edu:sample-10BT --out fineweb
    """
    from mblm.cli.pack import pack_sources

    with interrupt.raises():
        typer.echo(pack_sources(sources, out, field, valid, whole))


@command()
def plot(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of runs, their loss.csv or .pth, latest or FOLDER/latest."),
    ],
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("loss.png"),
) -> None:
    """Compare training runs, while they run, too: bits per byte, learning rate, speed.

    \b
    Examples:
      mblm plot latest
      mblm plot data/output/shakespeare_* --out curves.png
    """
    from mblm.train.plot import LOSS_FILE
    from mblm.train.plot import plot as plot_runs

    curves = plot_runs([find_run(run, holds=LOSS_FILE) for run in runs], out)
    typer.echo("\n".join([f"Wrote {out}", *map(str, curves)]))


@command()
def overview(
    configs: Annotated[list[Path], typer.Argument(help="YAML files of experiments or models.")],
    imports: Imports = None,
) -> None:
    """Tell what configurations make: layers, parameters, context, memory of weights.

    \b
    Example:
      mblm overview configs/*.yaml
    """
    from mblm.train.overview import format_overview, load_model

    typer.echo("\n\n".join(format_overview(file, load_model(file)) for file in configs))


@command()
def config(imports: Imports = None) -> None:
    """Print the JSON schema of an experiment's YAML file, for editors and other programs.

    \b
    Example:
      mblm config > experiment.schema.json
    """
    from mblm.train.schema import experiment_schema

    typer.echo(json.dumps(experiment_schema(), indent=2))


@command()
def models() -> None:
    """List the trained models that come with this package, each with its card's first words.

    \b
    Example:
      mblm generate python --prompt "class "
    """
    typer.echo("\n\n".join(describe_models()))


@command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, compiled and missing, and how to get it."""
    facts = collect_facts()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(format_facts(facts)))


@command()
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
    typer.echo(f"Saved the model in {out}. What it writes after the prompt:\n", err=True)
    typer.echo(prompt, nl=False)
    return stream(
        model,
        os.fsencode(prompt),
        num_tokens_to_generate=num_bytes,
        filter_thres=FILTER_THRES,
        temperature=TEMPERATURE,
        seed=seed,
    )
