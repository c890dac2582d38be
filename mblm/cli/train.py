"""`mblm train`, and what looks at configurations and runs: `plot`, `overview`, `config`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mblm.cli.options import Imports
from mblm.model.find import find_run


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


def config(imports: Imports = None) -> None:
    """Print the JSON schema of an experiment's YAML file, for editors and other programs.

    \b
    Example:
      mblm config > experiment.schema.json
    """
    from mblm.train.schema import experiment_schema

    typer.echo(json.dumps(experiment_schema(), indent=2))
