"""The command line, `mblm …`: what its commands take; the work is done elsewhere."""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mblm
from mblm.cli.generate import (
    LateFile,
    check_out,
    constraint_of,
    how_many,
    load,
    read_file,
    stream,
)
from mblm.cli.info import collect_facts, format_facts
from mblm.cli.prompts import generate_all, read_prompts
from mblm.model.find import find_model, find_run
from mblm.utils import interrupt
from mblm.utils.atomic import atomic_write
from mblm.utils.imports import import_modules

# Typer's own usage errors; their class is in click or in typer's copy of it.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)


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


def _import(names: list[str] | None) -> list[str]:
    """Import a user's modules as soon as the option is read: commands look blocks up by name."""
    import_modules(names or ())
    return names or []


# What several commands take.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder from save_pretrained, a training run's folder, its .pth file, latest (the "
        "newest run in data/output; of another folder FOLDER/latest), or a model's id on the hub.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. [default: cuda if available]")
]
RunConfig = Annotated[
    Path | None, typer.Option(help="The config.yaml of a .pth file, if not beside it.")
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import this Python module first, which registers blocks or datasets of your own; "
        "may be given several times.",
    ),
]


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


@app.command()
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
      mblm generate mblm-demo --prompt "def "
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
    if file is not None and prompts is not None:
        return generate_all(loaded, primes, file, num_bytes, **wishes)
    count = how_many(num_bytes, len(prime), loaded.max_length)
    return stream(loaded, prime, file, num_tokens_to_generate=count, **wishes)


@app.command()
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
    )


@app.command("eval")
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


@app.command()
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
    from mblm.cli.show import measure_file, name_of, read_text, writer_for

    write = writer_for(out)
    checkpoint = find_model(model)
    data = read_text(file)
    check_out(out, checkpoint, file, config)
    loaded = load(checkpoint, config, device)
    with interrupt.raises(), atomic_write(out) as stream:
        surprise = measure_file(loaded, data)
        write(surprise, name_of(file), stream)
    typer.echo(f"Wrote {out}: {surprise}")


@app.command()
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


@app.command()
def plot(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of runs, their loss.csv or .pth, latest or FOLDER/latest."),
    ],
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("loss.png"),
) -> None:
    """Draw loss and learning rate of training runs.

    \b
    Examples:
      mblm plot latest
      mblm plot data/output/shakespeare_* --out curves.png
    """
    from mblm.train.plot import LOSS_FILE
    from mblm.train.plot import plot as plot_runs

    curves = plot_runs([find_run(run, holds=LOSS_FILE) for run in runs], out)
    typer.echo(f"Wrote {out}: {', '.join(run.name for run in curves)}")


@app.command()
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


@app.command()
def config(imports: Imports = None) -> None:
    """Print the JSON schema of an experiment's YAML file, for editors and other programs.

    \b
    Example:
      mblm config > experiment.schema.json
    """
    from mblm.train.schema import experiment_schema

    typer.echo(json.dumps(experiment_schema(), indent=2))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, compiled and missing, and how to get it."""
    facts = collect_facts()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(format_facts(facts)))


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

    with interrupt.raises():
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
