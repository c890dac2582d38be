"""`mblm pack`: documents from anywhere in a folder that training reads fast."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mblm.cli.options import byte_bar
from mblm.utils import interrupt


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
    from mblm.data.documents import find_source
    from mblm.data.pack import pack as pack_sources

    found = [find_source(name) for name in sources]
    files = [file for source in found for file in source.files]
    # Of a URL or the hub there is no saying how much it is.
    are_here = all(source.files for source in found) and all(map(os.path.isfile, files))
    total = sum(map(os.path.getsize, files)) if are_here else None
    with interrupt.raises(), byte_bar(total) as bar:
        packed = pack_sources(found, out, field=field, valid=valid, whole=whole, on_read=bar.update)
    typer.echo(f"Packed into {out}")
    for name, part in packed.parts.items():
        typer.echo(f"{name}: {part.documents:,} documents, {part.bytes:,} bytes")
    if packed.left_out:
        told = ", ".join(f"{count:,} {why}" for why, count in packed.left_out.items())
        typer.echo(f"left out: {told}")
    typer.echo(f"Next: set io.dataset_dir to {out}")
