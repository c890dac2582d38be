"""What `mblm show` does: read a text, measure it with a bar, and write what the name asks for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import mblm
from mblm.cli.options import byte_bar
from mblm.show.page import write_page
from mblm.show.picture import check_matplotlib, write_picture
from mblm.show.surprise import Surprise, measure
from mblm.utils.io import open_binary

MOST_BYTES = 16 << 20  # a page has about nine times as many


def writer_for(out: Path) -> Callable[[Surprise, str, BinaryIO], None]:
    """What writes a file of this name."""
    suffix = out.suffix.lower()
    if suffix in (".html", ".htm"):
        return write_page
    if suffix not in (".png", ".svg"):
        raise ValueError(f"--out: expected a name that ends in .html, .png or .svg, got {out}")
    check_matplotlib()
    return partial(write_picture, suffix=suffix)


def read_text(file: Path) -> bytes:
    """A file's bytes."""
    with open_binary(file) as read:
        data = read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"{file}: more than {MOST_BYTES:,} bytes; pass a part, such as by head -c 1000000"
        )
    return data


def measure_file(model: mblm.MBLM, data: bytes) -> Surprise:
    """Measure a text, with a bar on a terminal."""
    with byte_bar(len(data)) as bar:
        return measure(model, data, on_progress=bar.update)
