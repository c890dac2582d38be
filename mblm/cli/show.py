"""`mblm show`: a page or a picture of how likely a model finds each byte of a text."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mblm.cli.options import (
    Device,
    Imports,
    Model,
    RunConfig,
    byte_bar,
    check_out,
    load,
    shown_name,
)
from mblm.model.find import find_model
from mblm.utils import interrupt
from mblm.utils.atomic import atomic_write

MOST_BYTES = 16 << 20  # a page has about nine times as many


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
    from mblm.show.page import write_page
    from mblm.show.picture import check_matplotlib, write_picture
    from mblm.show.surprise import measure
    from mblm.utils.io import STANDARD_INPUT, open_binary

    suffix, write = out.suffix.lower(), write_page
    if suffix in (".png", ".svg"):
        check_matplotlib()
        write = partial(write_picture, suffix=suffix)
    elif suffix not in (".html", ".htm"):
        raise ValueError(f"--out: expected a name that ends in .html, .png or .svg, got {out}")
    checkpoint = find_model(model)
    with open_binary(file) as read:
        data = read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"{file}: more than {MOST_BYTES:,} bytes; pass a part, such as by head -c 1000000"
        )
    check_out(out, checkpoint, file, config)
    loaded = load(checkpoint, config, device)
    with interrupt.raises(), atomic_write(out) as stream:
        with byte_bar(len(data)) as bar:
            surprise = measure(loaded, data, on_progress=bar.update)
        name = "standard input" if file == STANDARD_INPUT else shown_name(file)
        write(surprise, name, stream)
    typer.echo(f"Wrote {out}: {surprise}")
