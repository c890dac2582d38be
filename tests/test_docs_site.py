"""The site of docs/: its pages link to each other, and it is built from the docstrings."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "build_docs.py"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    runpy.run_path(str(SCRIPT))["write_pages"](folder)
    return folder


def test_links_of_pages_lead_to_pages(pages: Path) -> None:
    links = {
        (page.name, link)
        for page in pages.glob("*.md")
        for link in LINK.findall(page.read_text())
        if "://" not in link
    }
    assert ("index.md", "guide-train.md") in links and ("guide-train.md", "configs.md") in links
    assert [link for link in links if not (pages / link[1]).is_file()] == []


def test_every_page_is_in_the_navigation(pages: Path) -> None:
    nav, _, _ = (ROOT / "docs" / "zensical.toml").read_text().partition("[project.theme]")
    written = {page.name for page in pages.glob("*.md") if not page.name.startswith("reference-")}
    assert set(re.findall(r'"([\w-]+\.md)"', nav)) == written


def test_the_reference_has_all_that_the_api_page_names(pages: Path) -> None:
    listed = re.findall(r"`(mblm\.[\w.]+)`", (ROOT / "docs" / "api.md").read_text())
    shown = {
        name
        for page in pages.glob("reference-*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    assert shown <= set(listed)
    members = {name for name in listed if name.rpartition(".")[0] in shown}
    assert set(listed) - members - shown == {"mblm.constrain"}


@pytest.mark.slow
def test_it_is_built_offline_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    target = tmp_path / "docs"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = target / "site"
    reference = (site / "reference-mblm.html").read_text()
    assert "a row that ends makes room for the next prompt" in reference  # a docstring
    assert 'href="reference-mblm.html#mblm.MBLM.generate_batch"' in (site / "api.html").read_text()
    assert "generate_batch" in (site / "search.json").read_text()
    for page in site.glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+=\"?(https?:[^\">\s]+)", page.read_text())
        assert fetched == [], page.name
