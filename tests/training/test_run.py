import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest

from dml_jax._utils import sharding
from dml_jax.training import builder, checkpoint, resume, run, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
def test_a_finished_run_with_more_epochs_equals_the_longer_run(images, tmp_path):
    short, long = (tiny.config(images, epochs=epochs) for epochs in (1, 3))
    folder, expected = tmp_path / "grown", tmp_path / "long"
    run.train(short, folder)
    assert run.train(long, folder) == run.train(long, expected)
    for name in (run_directory.METRICS, run_directory.RESULT, run_directory.CONFIG):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert (
        run.train(short, folder)["last"]["epoch"] == 3
    )  # Fewer epochs have no effect on a finished run.

    result = (folder / run_directory.RESULT).read_bytes()
    (folder / run_directory.RESULT).unlink()
    with pytest.raises(ValueError, match="config.epochs is 1, but the run has already done 3"):
        run.train(short, folder)

    # Missing lines: the last one, and another one.
    metrics = (folder / run_directory.METRICS).read_bytes()
    first, second, _ = metrics.splitlines(keepends=True)
    (folder / run_directory.METRICS).write_bytes(first + second)
    with pytest.raises(ValueError, match=r"lacks the lines of epochs \[3\].* above 8"):
        run.train(long, folder)
    (folder / run_directory.METRICS).write_bytes(second)
    with pytest.raises(ValueError, match=r"lines of epochs \[1, 3\], but .* of step 12.* above 0"):
        run.train(long, folder)
    # The error message says to do this.
    (folder / run_directory.METRICS).write_bytes(first + second)
    for step in (folder / run_directory.CHECKPOINTS).iterdir():
        if int(step.name) > 8:
            shutil.rmtree(step)
    run.train(long, folder)
    assert (folder / run_directory.METRICS).read_bytes() == metrics
    assert (folder / run_directory.RESULT).read_bytes() == result


def test_a_last_epoch_without_an_evaluation_is_refused(images, tmp_path):
    config = tiny.config(images, epochs=2, evaluation__every_epochs=2)
    run.train(config, tmp_path)
    (tmp_path / run_directory.RESULT).unlink()
    shutil.rmtree(tmp_path / run_directory.CHECKPOINTS / "8")
    config.epochs = 1
    with pytest.raises(ValueError, match="without an evaluation of the last one"):
        run.train(config, tmp_path)


def test_a_fork_starts_from_a_copy_of_the_network_of_another_run(images, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    averages = {"optimizer__average_decay": 0.5}
    run.train(tiny.config(images, "ps_memvir", epochs=2, **averages), old)
    # Another loss, no MemVir and another seed: only the network is taken from the old run.
    config = tiny.config(images, "proxy_nca", epochs=1, seed=3, checkpoint__keep_last=9, **averages)
    result = run.train(config, new, fork_from=old)
    built = builder.build(parse(config), sharding.make_mesh())
    like = built.abstract_state
    with checkpoint.Checkpoints(new) as checkpoints:
        started = network_variables(checkpoints.restore(0, like))
    chex.assert_trees_all_equal(started, checkpoint.read_network(built.network, old, "last")[1])

    shutil.rmtree(old)
    (new / run_directory.RESULT).unlink()
    shutil.rmtree(new / run_directory.CHECKPOINTS / "4")
    assert run.train(config, new) == result
    assert run_directory.read_config(new).model.pretrained == "none"


def test_a_fork_from_a_different_network_is_refused_before_anything_is_written(images, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    resume.claim(old, parse(tiny.config(images)))
    with pytest.raises(ValueError, match="config.model.dim is 8, but .* has 16"):
        run.train(tiny.config(images, model__dim=8), new, fork_from=old)
    with pytest.raises(ValueError, match="config.model.channels is 'bgr', but .* has None"):
        run.train(tiny.config(images, model__channels="bgr"), new, fork_from=old)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        run.train(tiny.config(images), new, fork_from=tmp_path / "nowhere")
    assert not new.exists()


@pytest.mark.slow
def test_a_run_resumed_after_a_damaged_checkpoint_has_the_same_result(images, tmp_path, caplog):
    config = tiny.config(images, "ps_memvir", epochs=3)
    expected = run.train(config, tmp_path)
    metrics = (tmp_path / run_directory.METRICS).read_bytes()
    (tmp_path / run_directory.RESULT).unlink()
    (file,) = (
        tmp_path / run_directory.CHECKPOINTS / "12" / "state" / "ocdbt.process_0" / "d"
    ).iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert run.train(config, tmp_path) == expected
    assert (tmp_path / run_directory.METRICS).read_bytes() == metrics
    assert (
        "step 12 is damaged" in caplog.text and "intact checkpoint is that of step 8" in caplog.text
    )


def test_too_many_skipped_steps_or_epochs_are_refused(tmp_path):
    mesh = sharding.make_mesh()
    made = tiny.config(tiny.write_images(tmp_path), skip_nonfinite=4)
    with pytest.raises(ValueError, match="skip_nonfinite is 4, but an epoch has only 4 steps"):
        builder.build(parse(made), mesh)
    made.skip_nonfinite = 0
    made.optimizer.decay_epochs = (5, 2**30)
    with pytest.raises(ValueError, match="1073741824 epochs of 4 steps exceed the 32-bit"):
        builder.build(parse(made), mesh)


class DevicesInitialised(Exception):
    """Raised in place of initialising the devices."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_gpu_deterministic_ops=true"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=true", "--xla_gpu_deterministic_ops=true"),
    ],
)
def test_deterministic_sets_the_xla_flag_before_devices_are_initialised(
    given, expected, images, tmp_path, monkeypatch
):
    def make_mesh():
        raise DevicesInitialised(os.environ["XLA_FLAGS"].strip())

    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    for deterministic, flags in ((False, given), (True, expected)):
        monkeypatch.setenv("XLA_FLAGS", given)
        config = tiny.config(images, deterministic=deterministic)
        with pytest.raises(DevicesInitialised, match=f"^{flags}$"):
            run.train(config, tmp_path / "run")


def test_imports_do_not_initialise_devices():
    """Uses a new process, since this one has initialised its devices."""
    program = (
        "import jax\n"
        "from jax.extend import backend\n"
        "from dml_jax.cli import command_line\n"
        "from dml_jax.training import run\n"
        "import dml_jax.cli.train\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # An error once devices are initialised.
        "print(jax.device_count())\n"
    )
    started = [sys.executable, "-c", program]
    done = subprocess.run(started, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
