"""What `mblm pack` shows: progress while it reads, and what it has packed."""

import os
from collections.abc import Sequence
from pathlib import Path

from mblm.cli.options import byte_bar
from mblm.data.documents import find_source
from mblm.data.pack import pack
from mblm.data.packed import PackSummary


def pack_sources(names: Sequence[str], out: Path, field: str, valid: float, whole: bool) -> str:
    """Pack sources, with a bar on a terminal; returns what to say of it."""
    sources = [find_source(name) for name in names]
    files = [file for source in sources for file in source.files]
    # Of a URL or the hub there is no saying how much it is.
    are_here = all(source.files for source in sources) and all(map(os.path.isfile, files))
    total = sum(map(os.path.getsize, files)) if are_here else None
    with byte_bar(total) as bar:
        summary = pack(sources, out, field=field, valid=valid, whole=whole, on_read=bar.update)
    return format_summary(summary, out)


def format_summary(summary: PackSummary, out: Path) -> str:
    """A line for each part, one for what was left out, and what to type next."""
    lines = [
        f"{name}: {part.documents:,} documents, {part.bytes:,} bytes"
        for name, part in summary.parts.items()
    ]
    if summary.left_out:
        told = ", ".join(f"{count:,} {why}" for why, count in summary.left_out.items())
        lines.append(f"left out: {told}")
    return "\n".join([f"Packed into {out}", *lines, f"Next: set io.dataset_dir to {out}"])
