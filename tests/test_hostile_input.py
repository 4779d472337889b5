"""Nothing that is read can run code: what could do that is not used, in any file of the project."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("dml_jax", "scripts", "configs") for path in (ROOT / folder).rglob("*.py")
]
MODULES = {
    *("builtins", "cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "yaml")
}
IMPORTERS = {"importlib.import_module", "importlib.util.spec_from_file_location"}
NAMES = {"__import__", "compile", "eval", "exec"}
# Parsers in C++ of files that a run or an export has written, which this project cannot check.
PARSERS = {"faiss.read_index", "jax.export.deserialize"}
SUSPECTS = NAMES | PARSERS | IMPORTERS | {"numpy.load", "torch.load"}
ALLOWED = {
    # Modules of the package, imported when they are first asked for.
    "dml_jax/__init__.py": {"importlib.import_module"},
    "dml_jax/cli/__init__.py": {"importlib.import_module"},
    # Losses and other parts that a config names: files of the folder that the user is in.
    "dml_jax/_utils/registry.py": {"importlib.import_module"},
    "dml_jax/inference/retriever.py": {"jax.export.deserialize"},
    "dml_jax/search/index.py": {"faiss.read_index"},
    # Only for the name of the error that torch.load raises.
    "dml_jax/cli/convert_weights.py": {"pickle"},
    # A configuration is a Python file: one that the user names, or one of the project's own.
    "dml_jax/cli/reproduce.py": {"runpy"},
    "dml_jax/cli/report.py": {"runpy"},
}


def imports(tree):
    """Names in a module with what they stand for, such as `n` with `numpy`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dangers(tree):
    """What in a module could run code that comes from a file; `f = eval` as well as `eval(x)`."""
    known = dict(imports(tree))
    yield from {whole.partition(".")[0] for whole in known.values()} & MODULES
    checked = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.Name | ast.Attribute):
            continue
        name, dot, rest = ast.unparse(getattr(node, "func", node)).partition(".")
        called = known.get(name, name) + dot + rest
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                given.get("allow_pickle") == "False"
                and called == "numpy.load"
                or given.get("weights_only") == "True"
                and called == "torch.load"
            ):
                checked.add(node.func)
        elif (
            called in NAMES | PARSERS | IMPORTERS | {"numpy.load", "torch.load"}
            and node not in checked
        ):
            yield called


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_can_run_what_it_reads(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert set(dangers(ast.parse(path.read_text(encoding="utf-8")))) == allowed


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load",
        "import os, marshal",
        "import pickle as p",
        "from builtins import eval as calculate",
        "eval('1')",
        "calculate = eval",
        "import numpy as np; np.load(path)",
        "import numpy as n; n.load(path, allow_pickle=True)",
        "from numpy import load as read; read(path)",
        "import numpy; read = numpy.load",
        "import torch; torch.load(path)",
        "from torch import load; load(path, weights_only=False)",
        "import jax; jax.export.deserialize(data)",
        "from jax import export as e; e.deserialize(data)",
        "import faiss; faiss.read_index(path)",
        "import runpy; runpy.run_path(path)",
        "import importlib; importlib.import_module(name)",
        "from importlib import util; util.spec_from_file_location(name, path)",
    ],
)
def test_the_scan_finds_what_it_looks_for(code):
    assert list(dangers(ast.parse(code)))


def test_all_files_are_scanned():
    assert len(FILES) > 40
