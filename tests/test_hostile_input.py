"""Nothing that is read can run code: what could do that is not used, in any file of the project."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("dml_jax", "scripts", "configs") for path in (ROOT / folder).rglob("*.py")
]
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
NAMES = {"__import__", "compile", "eval", "exec"}


def dangers(tree, allowed_modules=()):
    """What in a module could run code that comes from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for module in modules:
                if module.partition(".")[0] in MODULES - set(allowed_modules):
                    yield f"line {node.lineno}: import of {module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in NAMES or called.startswith("pickle."):
                yield f"line {node.lineno}: {called}"
            elif called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                yield f"line {node.lineno}: {called} without allow_pickle=False"
            elif called == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_can_run_what_it_reads(path):
    # Only for the name of the error that torch.load raises.
    allowed = ("pickle",) if path.name == "convert_weights.py" else ()
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")), allowed)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load",
        "import os, marshal",
        "eval('1')",
        "pickle.loads(data)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
    ],
)
def test_the_scan_finds_what_it_looks_for(code):
    assert list(dangers(ast.parse(code)))
    assert len(FILES) > 40
