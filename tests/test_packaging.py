"""pyproject.toml against the files and the imports of the package."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
FILES = [file for folder in ("dml_jax", "configs") for file in (ROOT / folder).rglob("*.py")]
# MLflow is optional in the environment of the tests, and its distribution has another name.
DISTRIBUTIONS = {"mlflow": ["mlflow-skinny"], **packages_distributions()}


def canonical(requirement):
    name = re.match(r"[\w.-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


CORE = set(map(canonical, PROJECT["dependencies"]))
EXTRAS = {
    extra: set(map(canonical, requirements))
    for extra, requirements in PROJECT["optional-dependencies"].items()
}


def test_all_packages_are_listed():
    inits = (ROOT / "dml_jax").rglob("__init__.py")
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in inits}
    assert sorted(found | {"dml_jax.configs"}) == SETUPTOOLS["packages"]


def test_all_folders_with_code_are_packages():
    folders = {file.parent for file in (ROOT / "dml_jax").rglob("*.py")}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


def test_all_data_files_are_listed():
    listed = {ROOT / "dml_jax" / "py.typed"}
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            listed |= set((ROOT / package.replace(".", "/")).glob(pattern))
    found = {file for file in (ROOT / "dml_jax").rglob("*") if file.is_file()}
    code = {file for file in found if file.suffix in (".py", ".pyc")}
    assert found - code == listed


def imported(tree):
    """Yields each imported module, the extras of its context and whether a function imports it."""

    def visit(node, extras, local):
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "extras.required_by":
                    extras = [argument.value for argument in call.args]
        elif isinstance(node, ast.FunctionDef):
            local = True
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], extras, local
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0], extras, local
        for child in ast.iter_child_nodes(node):
            yield from visit(child, extras, local)

    yield from visit(tree, [], False)


def undeclared(code):
    """Yields what a module imports without a requirement that installs it."""
    for module, extras, local in imported(ast.parse(code)):
        if module in sys.stdlib_module_names or module == "dml_jax":
            continue
        names = set(map(canonical, DISTRIBUTIONS.get(module, [module])))
        allowed = [EXTRAS.get(extra, set()) for extra in extras]
        if local and not extras:
            # The function checks for the package itself.
            allowed = [set.union(*EXTRAS.values())]
        if not names & CORE and (not allowed or not all(names & extra for extra in allowed)):
            yield module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_all_imports_are_declared(file):
    assert not list(undeclared(file.read_text()))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import numpy, json, dml_jax", []),
        ("import jinja2", ["jinja2"]),
        ("from tensorflow_datasets.core import x", ["tensorflow_datasets"]),
        ("with extras.required_by('report'): import jinja2", []),
        ("with extras.required_by('prepare'): import jinja2", ["jinja2"]),
        ("with extras.required_by('reports'): import jinja2", ["jinja2"]),
        ("with extras.required_by('cpu', 'report'): import faiss", ["faiss"]),
        ("def f():\n    import wandb", []),
        ("def f():\n    import requests", ["requests"]),
    ],
)
def test_the_scan_finds_undeclared_imports(code, found):
    assert list(undeclared(code)) == found


def test_all_requirements_of_the_test_environment_are_pinned():
    pins = [
        canonical(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    extras = re.search(r"prepare_environment \S+ (\S+)", (ROOT / "scripts/test.sh").read_text())[1]
    required = CORE.union(*(EXTRAS[extra] for extra in extras.split(",")))
    assert not {name for name in required if name not in pins}
