"""A page that shows how much each byte of a text surprises a model, complete in one file."""

import base64
import json
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mblm.show.glyphs import glyph_sizes
from mblm.show.surprise import Surprise


def write_page(surprise: Surprise, name: str, file: BinaryIO) -> None:
    """Write a page that needs nothing but a browser.

    Numbers are rounded: bits to tenths, up to 25.5, and probabilities to hundredths.

    Args:
        surprise: What to show.
        name: The text's name.
        file: Where to write, as HTML.
    """
    template = Path(__file__).with_name("page.html").read_bytes()
    facts = json.dumps(_facts(surprise, name)).replace("<", "\\u003c")  # no tag ends the script
    before, between, after = template.split(b"@@")
    file.write(before + facts.encode() + between + base64.b64encode(_pack(surprise)) + after)


def _facts(surprise: Surprise, name: str) -> dict[str, object]:
    largest = max(surprise.patches, default=1)
    shifts = (surprise.places - np.arange(len(surprise.data))) % largest
    begins = np.flatnonzero(np.diff(shifts, prepend=-1))
    return {
        "name": name,
        "bytes": len(surprise.data),
        "total": str(surprise),
        "alternatives": surprise.alternatives.shape[1],
        "stages": [
            {"patch": patch, "bits": list(map(_number, surprise.bits_by_place(patch)))}
            for patch in surprise.patches
        ],
        # Place in a patch: a byte's index and the shift of the last of these before it.
        "shifts": np.stack((begins, shifts[begins]), axis=1).tolist(),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)  # JSON has no NaN


def _pack(surprise: Surprise) -> bytes:
    """One plane of bytes for each thing to know about a byte, compressed."""
    ids = np.minimum(surprise.alternatives, 65535).T
    planes = [
        np.frombuffer(surprise.data, np.uint8),
        np.frombuffer(glyph_sizes(surprise.data), np.uint8),
        np.minimum(np.round(surprise.bits * 10), 255).astype(np.uint8),
        (ids % 256).astype(np.uint8),
        (ids // 256).astype(np.uint8),
        np.round(surprise.probabilities.T * 100).astype(np.uint8),
    ]
    return zlib.compress(b"".join(plane.tobytes() for plane in planes))
