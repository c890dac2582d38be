"""Record what the model `python` writes in a terminal, as a picture for README.md.

python scripts/record_terminal.py docs/generate.svg
"""

import io
import re
import subprocess
import sys

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

COMMAND = 'mblm generate python --prompt "def " --temperature 0.7 --top-p 0.95 --seed 5 --bytes 600'
# Without fonts that a browser would fetch.
PICTURE = re.sub(r"<!--.*?-->|@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def draw(command: str, written: str, told: str) -> str:
    """A terminal with a command, what it writes and what it tells at the end, as an SVG."""
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text.assemble((f"$ {command}\n", "cyan"), f"{written}\n", (told, "dim")))
    return console.export_svg(title="", code_format=PICTURE)


def main() -> None:
    done = subprocess.run(["bash", "-c", COMMAND], capture_output=True, text=True, check=True)
    written = done.stdout[: done.stdout.rfind("\n")]  # whole lines
    with open(sys.argv[1], "w", encoding="utf-8") as picture:
        picture.write(draw(COMMAND, written, done.stderr.strip()))


if __name__ == "__main__":
    main()
