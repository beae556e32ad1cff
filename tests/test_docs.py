"""What the README and docs/ show runs, and what they link to is there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastssl.training import loop
from tests.page_reader import REPOSITORY, Reader, blocks_of, reachable, read
from tests.training.tiny import make_images

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
TOOLS = DOCS / "tools"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's blocks run: the reader's images, and the files that any page shows."""
    make_images(tmp_path / "images", 4)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            make_images(tmp_path / "labelled" / part / name, 4)
    for block in (block for page in PAGES for block in blocks_of(page)):
        if block.name:
            (tmp_path / block.name).write_text(reachable(block.text))
    monkeypatch.chdir(tmp_path)
    # It takes longer than such a run; tests/test_cli.py has it.
    monkeypatch.setattr(loop, "write_report", lambda *_, **__: None)
    return tmp_path


# Plans of the largest models.
SLOW = {DOCS / "scaling.md"}
READ = [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_shows_runs(page, folder, monkeypatch):
    reader = Reader(monkeypatch)
    for block in blocks_of(page):
        reader.read(block)


def test_blocks_are_found():
    languages = {block.language for page in PAGES for block in blocks_of(page)}
    assert languages >= {"bash", "python", "yaml", "text"}
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert fences == 2 * sum(len(blocks_of(page)) for page in PAGES)


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.is_file(), f"{page}: {target}"
        if anchor.startswith("fastssl."):
            place, _, name = anchor.rpartition(".")
            assert hasattr(importlib.import_module(place), name), f"{page}: {target}"
        elif anchor:
            assert anchor in anchors_of(other), f"{page}: {target}"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", TOOLS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_those_of_the_code(generate):
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES[1:]}
    old = [page for page, text in pages.items() if generate.fill(text, generate.WRITTEN) != text]
    assert old == [], "python docs/tools/generate.py writes them anew"
    marked = re.findall(r"<!-- begin: (\S+) -->", "".join(pages.values()))
    assert sorted(marked) == sorted(generate.WRITTEN | generate.FILLED_IN)


def test_parts_that_the_site_fills_in(generate):
    parts = {name: part() for name, part in generate.FILLED_IN.items()}
    assert "train.global_batch_size=256" in parts["keys"]
    assert "--measures" in parts["fastssl-eval"] and "usage" in parts["fastssl-embed"]
    assert "::: fastssl.kernels.koleo" in parts["kernels"]
    for name in parts:
        marks = f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->"
        assert parts[name] in generate.fill(f"a\n{marks}\nb", generate.FILLED_IN)


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load(read("mkdocs.yml"))["nav"]
    named = re.findall(r"'([\w/-]+\.md)'", repr(nav))
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES[1:])


def test_docstrings_become_markdown(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(TOOLS))
    to_markdown = importlib.import_module("docstrings").to_markdown
    text = "A loss::\n\n    a + b\n\nalpha, beta: weights\n    of it. Each.\nArgs:\n    x: one\n"
    assert to_markdown(text) == (
        "A loss:\n\n    a + b\n\n- `alpha`, `beta`: weights\n    of it. Each.\nArgs:\n    x: one"
    )
    named = "Arguments, by name:\n    out_dim (also K): width\n\nThe end."
    assert to_markdown(named) == "Arguments, by name:\n\n- `out_dim` (also K): width\n\nThe end."


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=quiet)
    assert result.returncode == 0, result.stderr
    assert "masked_gather" in (tmp_path / "reference/functional/index.html").read_text()
