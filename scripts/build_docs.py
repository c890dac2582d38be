"""Build the site of docs/ and an API reference; nothing is fetched and no link may be broken.

    python scripts/build_docs.py build/docs

The folder gets ``pages``, what docs/ holds and links to, and ``site``, to be opened in a browser. A
link out of docs/ leads to a page of the site: to a document of the project, to one that shows all
files of a folder, or to a copy of the file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
# Documents outside docs/, and the names of their pages.
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "dev/LOG.md": "log.md",
    "mblm/models/python/README.md": "model-python.md",
}
# Folders whose files one page shows.
FOLDERS = {"configs": ("configs.md", "Configurations"), "examples": ("examples.md", "Examples")}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "sh"}
LINK = re.compile(r"(\]\()([^)#\s]*)(#[^)\s]*)?(\))")
NAME = re.compile(r"`(mblm(?:\.\w+)+)`")


def write_pages(folder: Path) -> None:
    """Write all pages of the site, and the files that they show or link to."""
    folder.mkdir(parents=True)
    pages = {f"docs/{file.name}": file.name for file in (ROOT / "docs").glob("*.md")} | DOCUMENTS
    for source, page in pages.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a model card's fields
        (folder / page).write_text(linked(text, source, pages, folder), encoding="utf-8")
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        (folder / f"{notebook.stem}.md").write_text(as_page(notebook), encoding="utf-8")
    for source, (page, title) in FOLDERS.items():
        files = sorted(file for file in (ROOT / source).iterdir() if file.is_file())
        parts = [
            f"## {file.name} {{#{file.name}}}\n\n"
            f"```{LANGUAGES[file.suffix]}\n{file.read_text()}```\n"
            for file in files
        ]
        (folder / page).write_text("\n".join([f"# {title}\n", *parts]), encoding="utf-8")
    write_reference(folder)


def linked(text: str, source: str, pages: dict[str, str], folder: Path) -> str:
    """A document with links that hold on the site, whose files are copied to the folder."""

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups(default="")
        if not target or "://" in target:
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        parent, _, name = path.partition("/")
        if path in pages:
            place = pages[path]
        elif parent in FOLDERS:
            place, anchor = FOLDERS[parent][0], f"#{name}" if name else ""
        elif path.endswith(".ipynb"):
            place = f"{PurePosixPath(path).stem}.md"
        else:
            place = path.removeprefix("docs/")
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / place)
        return f"{before}{place}{anchor}{after}"

    return LINK.sub(link, text)


def as_page(notebook: Path) -> str:
    """The cells of a notebook, one after the other."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    )


def write_reference(folder: Path) -> None:
    """Write a page for each package, of the docstrings of what docs/api.md names."""
    listed = (folder / "api.md").read_text(encoding="utf-8")
    names = set(NAME.findall(listed)) - {"mblm.constrain"}  # a module, whose names are listed
    tops = sorted(name for name in names if name.rpartition(".")[0] not in names)
    groups = defaultdict(list)
    for name in tops:
        groups[".".join(name.split(".")[: 2 if name.count(".") > 1 else 1])].append(name)
    for group, members in groups.items():
        entries = "\n".join(f"::: {name}" for name in members)
        (folder / f"reference-{group}.md").write_text(f"# {group}\n\n{entries}\n")
    contents = "".join(f"- [`{group}`](reference-{group}.md)\n" for group in groups)
    listed = NAME.sub(lambda at: f"[{at[0]}][{at[1]}]" if at[1] in names else at[0], listed)
    (folder / "api.md").write_text(f"{listed}\n## All docstrings\n\n{contents}", encoding="utf-8")


def main() -> None:
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    write_pages(target / "pages")
    shutil.copy(ROOT / "docs" / "zensical.toml", target)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "zensical.toml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # where the docstrings are read
    status = subprocess.run(command, cwd=target, env=environment).returncode
    if status:
        sys.exit(status)
    print(f"Open {target / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
