"""Record what the model `python` writes in a terminal, as a picture for README.md.

python scripts/record_terminal.py docs/generate.svg
"""

import html
import subprocess
import sys
from pathlib import Path

COMMAND = 'mblm generate python --prompt "def " --temperature 0.7 --top-p 0.95 --seed 5 --bytes 600'
COLUMNS = 100
LINE, CHARACTER, MARGIN = 18, 8.0, 14  # pixels


def draw(command: str, written: str, told: str) -> str:
    """A terminal with a command, what it writes and what it tells at the end, as an SVG."""
    lines = [("prompt", f"$ {command}")]
    lines += [("text", part) for line in written.split("\n") for part in wrapped(line)]
    lines += [("told", told)]
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN + 22
    dots = "".join(
        f'<circle cx="{MARGIN + 6 + 20 * n}" cy="16" r="6" fill="{color}"/>'
        for n, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    rows = "\n".join(
        f'<text class="{kind}" x="{MARGIN}" y="{MARGIN + 22 + LINE * (n + 0.75):g}">'
        f"{html.escape(text, quote=False)}</text>"
        for n, (kind, text) in enumerate(lines)
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">
<title>{html.escape(command)}</title>
<style>
text {{ font: 13px Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
text {{ fill: #d6deeb; }}
.prompt {{ fill: #7fdbca; }}
.told {{ fill: #7c8aa0; }}
</style>
<rect width="100%" height="100%" rx="8" fill="#16202e"/>
{dots}
{rows}
</svg>
"""


def wrapped(line: str) -> list[str]:
    """A line as a terminal shows it."""
    return [line[at : at + COLUMNS] for at in range(0, max(len(line), 1), COLUMNS)]


def main() -> None:
    done = subprocess.run(["bash", "-c", COMMAND], capture_output=True, text=True, check=True)
    written = done.stdout[: done.stdout.rfind("\n")]  # whole lines
    Path(sys.argv[1]).write_text(draw(COMMAND, written, done.stderr.strip()), encoding="utf-8")


if __name__ == "__main__":
    main()
