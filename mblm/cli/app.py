"""The command line, `mblm …`: its commands, and how it tells errors."""

import sys
from typing import Annotated, Any

import typer
import typer.core

import mblm
from mblm.cli.evaluate import evaluate
from mblm.cli.generate import demo, generate
from mblm.cli.info import info, models
from mblm.cli.pack import pack
from mblm.cli.show import show
from mblm.cli.train import config, overview, plot, train
from mblm.utils.naming import naming
from mblm.utils.say import say

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
        names = dict(prime="--prompt", num_tokens_to_generate="--bytes", max_bytes="--bytes")
        names["seeds"] = "--seed"
        options = {p.name: p.opts[0] for p in self.params if p.opts[0].startswith("--")}
        with naming(**names, **options):
            return super().invoke(context)


COMMANDS = generate, train, evaluate, show, pack, plot, overview, config, models, info, demo
for function in COMMANDS:
    app.command("eval" if function is evaluate else None, cls=_Command)(function)


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
    say(f"mblm: error: {message}")
    return status


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
