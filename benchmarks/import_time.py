"""Print what ``import mblm`` costs over ``import torch``: medians over fresh interpreters.

The package imports its names when they are first used, so the cost of the first one is told too.

Run: python benchmarks/import_time.py [runs]
"""

import statistics
import subprocess
import sys

TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
OVER = "import torch; " + TIMED


def seconds(code: str, runs: int) -> float:
    """Median of what the code prints."""
    command = [sys.executable, "-c", code]
    outputs = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(runs)]
    return statistics.median(float(output) for output in outputs)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds(OVER.format("from mblm import MBLM"), 1)  # warms the disk cache
    print(f"python {sys.version.split()[0]}, medians of {runs} runs")
    for title, code in (
        ("import torch", TIMED.format("import torch")),
        ("import pydantic, over torch", OVER.format("from pydantic import BaseModel")),
        ("import mblm, over torch", OVER.format("import mblm")),
        ("from mblm import MBLM, over torch", OVER.format("from mblm import MBLM")),
    ):
        print(f"{title:<34}{seconds(code, runs):6.3f} s")


if __name__ == "__main__":
    main()
