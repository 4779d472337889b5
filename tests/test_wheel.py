"""A built wheel, installed into an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import dml_jax

ROOT = Path(__file__).parents[1]
SOURCES = ("dml_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")

pytestmark = pytest.mark.slow


def succeed(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy, since setuptools leaves folders beside the sources.
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=leave_out)
        else:
            shutil.copy2(ROOT / name, sources / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    succeed(*pip, f"--wheel-dir={out}", sources)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel and this environment's dependencies."""
    venv = tmp_path_factory.mktemp("venv")
    succeed(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", f"--python={python}", "install")
    succeed(*pip, "--no-deps", "--no-index", wheel)
    # A path in a .pth file is searched for modules, but its own .pth files are not read. So the
    # editable installation of this environment is not found.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return venv / "bin"


def start(command, folder):
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    return succeed(*command, cwd=folder, env=environment)


def test_the_wheel_has_all_files(wheel):
    expected = {f"dml_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    for file in (ROOT / "dml_jax").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            expected.add(file.relative_to(ROOT).as_posix())
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name == f"dml_jax-{dml_jax.__version__}-py3-none-any.whl"


def table_rows(printed):
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_the_quickstart_runs_in_an_empty_folder_and_reuses_finished_runs(programs, tmp_path):
    where = start(
        [programs / "python", "-c", "import dml_jax; print(dml_jax.__file__)"], tmp_path
    ).strip()
    assert Path(where).is_relative_to(programs.parent)
    command = [programs / "dml-jax", "quickstart", "--epochs=1"]
    printed, root = start(command, tmp_path), tmp_path / "runs" / "quickstart"
    assert printed.rstrip().endswith(str(root / "report.html"))
    assert (root / "report.html").stat().st_size > 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]

    rows, variants = table_rows(printed), ["baseline", "ps", "memvir", "ps_memvir"]
    assert [row[0] for row in rows] == ["raw pixels", "untrained network", *variants]
    baseline, *others = (float(row[3]) for row in rows[2:])
    for row, score in zip(rows[3:], others, strict=True):
        assert float(row[4]) == pytest.approx(score - baseline, abs=0.11)
    assert 30 < float(rows[0][3]) < 32 and float(rows[1][3]) < 15

    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert table_rows(start(command, tmp_path)) == rows
    assert written == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_packaged_config_is_found_by_its_name(programs, tmp_path):
    command = [programs / "dml-jax", "train", "--config=birds", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(
        AssertionError, match=r"error: there is no config 'birds'.* cars196, cub200"
    ):
        start(command, tmp_path)
    # The weights of cars196 are not here, so the run ends once it has read the config.
    command[2] = "--config=cars196:ps"
    with pytest.raises(AssertionError, match=r"there are no weights at .*bninception"):
        start(command, tmp_path)
