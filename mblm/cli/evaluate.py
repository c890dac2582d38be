"""What `mblm eval` shows: progress while it reads files, and a table of their scores."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mblm
from mblm.cli.options import byte_bar, shown_name
from mblm.inference.score_files import FileScore, score_files


def check_files(files: Sequence[Path]) -> None:
    """Refuse models among the texts: a glob may name several."""
    for file in files:
        if file.suffix == ".pth":
            raise ValueError(f"{file} is a model and no text; of several models evaluate each")


def evaluate_files(
    model: mblm.MBLM, files: Sequence[Path], length: int | None, stride: int | None, batch: int
) -> dict[str, Any]:
    """Score files, with a bar on a terminal: ``{files: [{file, bytes, bits_per_byte}], …}``."""
    total = sum(file.stat().st_size for file in files if file.is_file())  # 0: there is no saying
    with byte_bar(total) as bar:
        begin = time.perf_counter()
        scores = score_files(
            model, files, length=length, stride=stride, batch_bytes=batch, on_progress=bar.update
        )
        seconds = time.perf_counter() - begin
    in_all = FileScore(sum(s.num_bytes for s in scores), sum(s.bits for s in scores))
    named = zip(map(shown_name, files), scores, strict=True)
    return {
        "files": [{"file": name, **_row(score)} for name, score in named],
        **_row(in_all),
        "bytes_per_second": in_all.num_bytes / seconds,
    }


def format_scores(scores: dict[str, Any]) -> str:
    """A table of what `evaluate_files` returns, all files together in the last line."""
    rows = [*scores["files"], {**scores, "file": "in all"}]
    width = max(len(row["file"]) for row in rows)
    lines = [f"{'file':{width}}  {'bytes':>14}  bits per byte"]
    for row in rows:
        bits = row["bits_per_byte"]
        shown = "-" if bits is None else f"{bits:.4f}"
        lines.append(f"{row['file']:{width}}  {row['bytes']:14,}  {shown:>13}")
    return "\n".join(lines)


def _row(score: FileScore) -> dict[str, Any]:
    bits = score.bits_per_byte if score.num_bytes else None  # JSON has no NaN
    return {"bytes": score.num_bytes, "bits_per_byte": bits}
