"""No input file can run code: the project uses no function that could execute what it reads."""

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
# C++ parsers of files that a run or an export wrote; this project cannot check them.
PARSERS = {"faiss.read_index", "jax.export.deserialize"}
SUSPECTS = NAMES | PARSERS | IMPORTERS | {"numpy.load", "torch.load"}
ALLOWED = {
    # Losses and other parts in files of the current folder, which a config names.
    "dml_jax/_utils/registry.py": {"importlib.import_module"},
    # Lazy imports of the package's own modules.
    "dml_jax/__init__.py": {"importlib.import_module"},
    "dml_jax/cli/__init__.py": {"importlib.import_module"},
    "dml_jax/inference/retriever.py": {"jax.export.deserialize"},
    "dml_jax/search/index.py": {"faiss.read_index"},
    # Only for the class of the error that torch.load raises.
    "dml_jax/cli/convert_weights.py": {"pickle"},
    # A config is a Python file: the user names it, or it is a packaged one.
    "dml_jax/cli/config_flag.py": {"runpy"},
}


def imports(tree):
    """Yields each imported name of a module and its full name, such as `np` and `numpy`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, whole
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def unsafe_uses(tree):
    """Yields what could run code from a file, whether called (`eval(x)`) or not (`f = eval`)."""
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
        elif called in SUSPECTS and node not in checked:
            yield called


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_code_from_a_file(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert set(unsafe_uses(ast.parse(path.read_text(encoding="utf-8")))) == allowed


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
def test_the_scan_finds_unsafe_uses(code):
    assert list(unsafe_uses(ast.parse(code)))


def test_all_files_are_scanned():
    assert len(FILES) > 40
