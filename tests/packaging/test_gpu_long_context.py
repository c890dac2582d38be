"""benchmarks/gpu_long_context.py where there is no GPU: its search, and a tiny run of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_long_context import longest

from tests import fresh

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUN = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Step:
    """Steps on up to so many bytes fit."""

    def __init__(self, room: int, per_byte: float = 0.0) -> None:
        self.room, self.per_byte = room, per_byte

    def __call__(self, count: int) -> dict[str, Any]:
        return {"bytes": count, "fits": count <= self.room, "wall_s": count * self.per_byte}


@pytest.mark.parametrize("room", [1, 63, 64, 1000, 1023, 50_000])
def test_finds_what_fits_to_a_sixteenth(room: int) -> None:
    results, ended = longest(Step(room), 64, None, 60)
    best = max(result["bytes"] for result in results if result["fits"])
    assert best <= room < best * (1 + 1 / 16) + 1
    assert ended == "the next length tried does not fit"


@pytest.mark.parametrize(
    ("step", "first", "most", "tried", "ended"),
    [
        (Step(0), 8, None, [8, 4, 2, 1], "nothing fits"),
        (Step(10**9), 10, 35, [10, 20, 35], "35 bytes"),
        (Step(10**9, per_byte=1), 10, None, [10, 20], "no time"),
    ],
    ids=["nothing-fits", "the-most", "no-time"],
)
def test_says_why_it_ends(
    step: Step, first: int, most: int | None, tried: list[int], ended: str
) -> None:
    results, why = longest(step, first, most, 35)
    assert [result["bytes"] for result in results] == tried
    assert ended in why


def test_a_tiny_run_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = BENCHMARKS / "gpu_long_context.py"
    fresh.output_of(RUN, script, "--quick", "--first", 900, "--most", 900, "--json", out)
    figures = json.loads(out.read_text())
    assert figures["longest_bytes"] == 900
    assert [step["bytes"] for step in figures["steps"]] == [900]
    assert all(step["fits"] and step["loss"] > 0 for step in figures["steps"])
