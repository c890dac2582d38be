"""Print what ``import mblm`` costs over ``import torch``: medians over fresh interpreters.

Run: python benchmarks/import_time.py [runs]
"""

import statistics
import subprocess
import sys

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
OVER = "import torch; " + TIMED


def seconds(code: str, runs: int) -> float:
    """Median of what the code prints."""
    command = [sys.executable, "-c", code]
    outputs = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(runs)]
    return statistics.median(float(output) for output in outputs)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds(OVER.format("mblm"), 1)  # warms the disk cache
    print(f"python {sys.version.split()[0]}, medians of {runs} runs")
    print(f"import torch             {seconds(TIMED.format('torch'), runs):6.3f} s")
    print(f"import mblm, over torch  {seconds(OVER.format('mblm'), runs):6.3f} s")


if __name__ == "__main__":
    main()
