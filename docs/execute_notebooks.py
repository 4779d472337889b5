"""Writes the notebooks of docs/notebooks, executed, from the scripts beside them.

python docs/execute_notebooks.py [SCRIPT ...]
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(script: Path) -> None:
    """Writes the executed notebook of a script; only its outputs differ from run to run."""
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1800, resources=resources, record_timing=False).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def _merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins neighbouring lines of text, which arrive one by one, some of them also as HTML."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "text/html" in output.get("data", {}):
            text = output.data["text/plain"]
            output = nbformat.v4.new_output("stream", name="stdout", text=text)
        stream = output.get("name")
        if stream and merged and merged[-1].get("name") == stream:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.py")):
        execute(path)
