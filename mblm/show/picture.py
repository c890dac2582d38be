"""A picture that shows how much each byte of a text surprises a model."""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mblm.show.glyphs import NEWLINE, TAB, WIDE, glyph_sizes
from mblm.show.surprise import Surprise

COLUMNS = 100
MOST_ROWS = 60
HOTTEST = 10  # bits
SIZE = 9  # points of the font
_LABELS = {TAB: ("→", 4), NEWLINE: ("↵", 1)}
FONT = "DejaVu Sans Mono"  # matplotlib brings it


def check_matplotlib() -> None:
    """Raise a ValueError that says how to get it where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'mblm[plot]'") from error


def write_picture(surprise: Surprise, name: str, file: BinaryIO, suffix: str = ".png") -> None:
    """Draw the beginning of a text, up to 60 lines, and its bits by place in a patch.

    Args:
        surprise: What to show.
        name: The text's name.
        file: Where to write.
        suffix: The format, ``.png`` or ``.svg``.

    Raises:
        ValueError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    cells = list(_cells(surprise.data))
    rows = max((cell.row for cell in cells), default=0) + 1
    # Inches, from the top: title, legend, text, a chart for each stage.
    wide, high = COLUMNS * SIZE * 0.602 / 72, rows * SIZE * 1.4 / 72
    whole = (wide + 0.4, 1.15 + high + 1.3 * len(surprise.patches))
    figure = Figure(figsize=whole)

    def axes_at(top: float, tall: float, inset: float = 0) -> Any:
        area = (0.2 + inset, whole[1] - top - tall, wide - inset, tall)
        return figure.add_axes(tuple(np.divide(area, whole * 2)))

    shown = sum(cell.num_bytes for cell in cells)
    part = f", of which the first {shown:,} are shown" if shown < len(surprise.data) else ""
    name = name.encode(errors="replace").decode()  # a file's name may be no text
    title = f"{name}\n{surprise}{part}\nbits that a byte takes:"
    at = (0.2 / whole[0], 1 - 0.1 / whole[1])
    figure.text(*at, title, va="top", fontsize=SIZE, parse_math=False)
    scale = LinearSegmentedColormap.from_list("surprise", ["white", "#ff8c26"])
    colors = ScalarMappable(Normalize(0, HOTTEST), scale)
    legend = figure.colorbar(colors, axes_at(0.65, 0.1), orientation="horizontal", extend="max")
    legend.ax.tick_params(labelsize=SIZE - 2)
    _draw_text(axes_at(0.95, high), cells, colors.to_rgba(surprise.bits[:shown]), rows)
    for stage, patch in enumerate(surprise.patches):
        axes = axes_at(1.15 + high + 1.3 * stage, 0.8, 0.5)
        bits = surprise.bits_by_place(patch)
        width = patch / len(bits)
        axes.bar((np.arange(len(bits)) + 0.5) * width + 0.5, bits, 0.9 * width, color="C1")
        axes.set_xlim(0.5, patch + 0.5)
        axes.set_ylabel("mean bits", fontsize=SIZE)
        axes.set_xlabel(f"place in the patch of {patch} bytes, stage {stage + 1}", fontsize=SIZE)
    figure.savefig(file, format=suffix.removeprefix("."), dpi=100)


def _draw_text(axes: Any, cells: "list[_Cell]", colors: np.ndarray, rows: int) -> None:
    """Draw cells, with a color for each byte of a character."""
    from matplotlib.collections import PolyCollection

    boxes = []
    for row, column, columns, label, count in cells:
        for part in range(count):
            left, right = (column + columns * (part + side) / count for side in (0, 1))
            boxes.append([(left, row), (right, row), (right, row + 1), (left, row + 1)])
        if label != " ":
            style = {"ha": "center", "va": "center_baseline", "parse_math": False}
            middle = (column + columns / 2, row + 0.5)
            axes.text(*middle, label, family=FONT, fontsize=SIZE, **style)
    axes.add_collection(PolyCollection(boxes, facecolors=colors, linewidths=0))
    axes.set(xlim=(0, COLUMNS), ylim=(rows, 0))
    axes.set_axis_off()


class _Cell(NamedTuple):
    row: int
    column: int
    columns: int
    label: str
    num_bytes: int


def _cells(data: bytes) -> Iterator[_Cell]:
    """What is shown of a text."""
    from matplotlib.font_manager import findfont, get_font

    has = get_font(findfont(FONT)).get_char_index
    sizes = glyph_sizes(data)
    row = column = at = 0
    while at < len(data):
        count, columns = sizes[at] % WIDE, 1 + (sizes[at] > WIDE)
        label = data[at : at + count].decode()
        if data[at] in _LABELS:
            label, columns = _LABELS[data[at]]
        if not (label and has(ord(label))):  # its bytes
            label, count, columns = f"{data[at]:02X}", 1, 2
        if column + columns > COLUMNS:
            row, column = row + 1, 0
        if row == MOST_ROWS:
            return
        yield _Cell(row, column, columns, label, count)
        row, column = (row + 1, 0) if data[at] == NEWLINE else (row, column + columns)
        at += count
