"""Tests of the documentation site and its notebooks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="the extra docs is not installed")

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


def test_the_site_builds_without_warnings_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr

    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    for page, text in pages.items():
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*href=\"?(?:https?:)?//", text), page

    methods = pages[tmp_path / "methods" / "index.html"]
    formulas = re.findall(r"<math.*?</math>", methods, re.DOTALL)
    assert len(formulas) > 50
    assert "arithmatex" not in methods
    assert not [formula for formula in formulas if "\\" in formula]
    assert "dml_jax.memvir.loss_and_update" in pages[tmp_path / "api" / "memvir" / "index.html"]
    assert "Glossary" in pages[tmp_path / "CONTRIBUTING" / "index.html"]
    assert "MAP@R" in pages[tmp_path / "notebooks" / SCRIPTS[0].stem / "index.html"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_has_the_cells_of_its_script(script):
    written, notebook = (jupytext.read(script.with_suffix(x)) for x in (".py", ".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in x.cells] for x in (written, notebook)]
    assert cells[0] == cells[1], "run python docs/execute_notebooks.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_executed_and_small(script):
    path = script.with_suffix(".ipynb")
    code = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [x for cell in code for x in cell["outputs"] if x["output_type"] == "error"]
    assert path.stat().st_size < 200_000


# The pages were executed with longer runs.
SHORTER = {
    "metric_learning_on_your_images": ('"epochs": 12', '"epochs": 4'),
    "ps_and_memvir_in_your_flax_loop": ("= 64, 128, 500, 132", "= 64, 128, 60, 20"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs_as_plain_python(script, tmp_path):
    code, (published, shorter) = script.read_text(), SHORTER[script.stem]
    assert code.count(published) == 1
    (tmp_path / "script.py").write_text(code.replace(published, shorter))
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "MAP@R" in run.stdout
