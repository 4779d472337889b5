"""Tests that the documentation refers to files and tests that exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def defined_tests(file):
    """Returns the names of the tests in a file, with their classes as prefixes."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


def anchors(page):
    """Returns the anchors of a page's headings, in GitHub's notation."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_test_exists(page):
    named = re.findall(r"\b(tests/[\w/]+\.py)((?:::\w+)*)", page.read_text(encoding="utf-8"))
    missing = [
        file + test
        for file, test in named
        if not (ROOT / file).exists()
        or (test and test.removeprefix("::") not in defined_tests(ROOT / file))
    ]
    assert not missing


def test_reliability_names_tests_by_path():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`tests/[\w/]+\.py(?:::\w+)*`", text)) > 50
    assert not re.findall(r"`(?!tests/)[^`\n]*test_\w+[^`\n]*`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_a_target(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_module_and_program_exists(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\b(?:dml_jax|configs|scripts|benchmarks)/[\w/]+\.(?:py|sh)\b", text)
    files += [f"{x.replace('.', '/')}.py" for x in re.findall(r"python -m (benchmarks\.\w+)", text)]
    assert not [file for file in files if "NAME" not in file and not (ROOT / file).exists()]


def test_the_page_of_settings_is_current():
    # In a process of its own: tests register backbones that are not part of the package.
    command = [sys.executable, "-m", "dml_jax.training.reference"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == done.stdout
