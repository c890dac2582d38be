"""`mblm eval`: bits per byte of files, and a table of them."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mblm.cli.options import Device, Imports, Model, RunConfig, byte_bar, load, shown_name
from mblm.model.find import find_model
from mblm.utils.say import say

if TYPE_CHECKING:
    from mblm.inference.score_files import FileScore


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
    from mblm.inference.score_files import FileScore, score_files

    for file in files:
        if file.suffix == ".pth":  # a glob may name several
            raise ValueError(f"{file} is a model and no text; of several models evaluate each")
    loaded = load(find_model(model), config, device)
    total = sum(file.stat().st_size for file in files if file.is_file())  # 0: there is no saying
    with byte_bar(total) as bar:
        begin = time.perf_counter()
        scores = score_files(
            loaded,
            files,
            length=length,
            stride=stride,
            batch_bytes=batch_bytes,
            on_progress=bar.update,
        )
        seconds = time.perf_counter() - begin
    in_all = FileScore(sum(s.num_bytes for s in scores), sum(s.bits for s in scores))
    named = zip(map(shown_name, files), scores, strict=True)
    rows = [{"file": name, **_row(score)} for name, score in named]
    total_row, speed = _row(in_all), in_all.num_bytes / seconds
    if as_json:
        typer.echo(json.dumps({"files": rows, **total_row, "bytes_per_second": speed}, indent=2))
        return
    rows.append({"file": "in all", **total_row})
    width = max(len(row["file"]) for row in rows)
    typer.echo(f"{'file':{width}}  {'bytes':>14}  bits per byte")
    for row in rows:
        bits = row["bits_per_byte"]
        shown = "-" if bits is None else f"{bits:.4f}"
        typer.echo(f"{row['file']:{width}}  {row['bytes']:14,}  {shown:>13}")
    say(f"{speed:,.0f} bytes/s")


def _row(score: "FileScore") -> dict[str, Any]:
    bits = score.bits_per_byte if score.num_bytes else None  # JSON has no NaN
    return {"bytes": score.num_bytes, "bits_per_byte": bits}
