import json
import subprocess
import sys
from pathlib import Path

import pytest

from dml_jax import data
from dml_jax.cli import command_line
from dml_jax.training import variants
from tests.helpers import tiny


def exit_code(work):
    with pytest.raises(BaseException) as ended, command_line.user_errors():
        work()
    return getattr(ended.value, "code", ended.value)


def test_a_user_error_is_reported_by_its_message(capsys):
    assert exit_code(lambda: variants.parse_variant("psi")) == 2
    assert capsys.readouterr().err.startswith("error: unknown variant 'psi'")
    assert exit_code(Path("nowhere").read_bytes) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_error_in_a_worker_is_reported(tmp_path, capsys, num_workers):
    images = tiny.write_images(tmp_path / "images")
    path = images / "train" / "class1" / "2.png"
    path.write_bytes(path.read_bytes()[:100])

    def read():
        source = data.create("folder", root=images)["train"]
        settings = {"num_workers": num_workers, "batch_size": 6, "image_size": 8, "resize": 8}
        batches = data.test_batches(source, **settings)
        try:
            list(batches)
        finally:
            batches.close()

    assert exit_code(read) == 2
    assert "class1/2.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug",
    [
        lambda: json.loads("{"),
        lambda: dict(zip((1,), (), strict=True)),
        lambda: data.Augmentation(crop_scale=("a", "b", *int("c"))),
    ],
)
def test_other_value_errors_are_bugs(bug):
    assert isinstance(exit_code(bug), ValueError)


@pytest.mark.parametrize(
    ("program", "package", "command"),
    [
        ("report", "plotly", 'pip install "dml_jax[report]"'),
        ("prepare", "tensorflow_datasets", 'pip install "dml_jax[prepare]"'),
        ("train", "faiss", 'pip install "dml_jax[cpu]" or pip install "dml_jax[cuda]"'),
    ],
)
def test_a_missing_extra_is_reported_with_the_install_command(program, package, command):
    # None in sys.modules makes the import fail as for a missing package.
    code = f"""
import sys
from dml_jax.__main__ import start

sys.modules["{package}"] = None
sys.argv = ["dml-jax", "{program}"]
start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the package {package} is not installed: {command}")
    assert "Traceback" not in done.stderr


def test_an_unknown_config_is_reported_with_the_known_names(tmp_path):
    command = [sys.executable, "-m", "dml_jax", "train", "--config=birds", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no config 'birds': give the path of a .py file")
    assert not list(tmp_path.iterdir())


def test_help_shows_the_docstring_and_the_flags_of_the_program():
    command = [sys.executable, "-m", "dml_jax", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Trains an embedding or resumes an interrupted run." in done.stdout
    assert "--fork_from" in done.stdout
