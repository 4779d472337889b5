import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest
from PIL import Image

from dml_jax._utils import free_memory, sharding
from dml_jax.configs import folder
from dml_jax.training import builder, memory_check, run, run_directory, step
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))


@pytest.fixture
def host(monkeypatch):
    """Sets the free memory of the host, without other limits."""

    def set_free(free):
        monkeypatch.setattr(free_memory, "of_host", lambda: {"the host": free})
        monkeypatch.setattr(free_memory, "of_process", dict)

    return set_free


def built_on(devices, images, variant="baseline", **settings):
    config = tiny.config(images, variant, **settings)
    return builder.build(parse(config), sharding.make_mesh(jax.devices()[:devices]))


@pytest.mark.slow
def test_a_run_compiles_and_traces_its_step_once(images, tmp_path, monkeypatch, caplog, one_device):
    chex.clear_trace_counter()
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(n=1)(step.train_step))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run.train(tiny.config(images, "ps_memvir", epochs=2), tmp_path / "run")
    compiled = [x for x in caplog.messages if x.startswith("Finished XLA compilation of")]
    names = [message.split()[4] for message in compiled]
    for name in ("jit(step)", "jit(embed_batch)"):
        assert names.count(name) == 1, names


@pytest.mark.parametrize("devices", [1, 2])
def test_the_fixed_memory_of_a_step_is_its_state_and_batch(images, devices):
    settings = {"memvir__num_steps": 4, "memvir__step_gap": 3, "model__dim": 64}
    built = built_on(devices, images, "memvir", **settings)
    state = built.init()
    _, batch = next(iter(device_batches(built, 0, 1)))
    chex.assert_trees_all_equal_shapes_and_dtypes(builder.abstract_batch(built), batch)
    needed = memory_check.need(built)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state, batch)))
    # The compiler leaves out arrays that the step does not read, and may pad small ones.
    assert needed.fixed == pytest.approx(held, abs=1000)
    assert needed.temporary > 8 / devices * 16 * 16 * 3 * 4  # Images in float32.


def test_the_abstract_batch_matches_a_batch_of_cached_images(images):
    built = built_on(2, images, data__cache="device")
    _, batch = next(iter(device_batches(built, 0, 1)))
    chex.assert_trees_all_equal_shapes_and_dtypes(builder.abstract_batch(built), batch)


@pytest.mark.parametrize("devices", [1, 2])
def test_cpu_devices_share_the_free_memory_of_the_host(images, host, devices):
    host(8 * GB)
    built = built_on(devices, images, data__num_workers=2)
    state = sum(x.nbytes for x in jax.tree.leaves(built.init()))
    room = memory_check.free_room(built)
    assert room.size == pytest.approx((8 * GB - 500_000_000 - 2 * 250_000_000 - state) / devices)
    assert re.match("the host has 8.00 GB free, of which the rest of the program", room.where)
    host(GB)
    assert memory_check.free_room(built).size < 0


def test_an_accelerator_has_its_own_memory(images, host, monkeypatch):
    class Accelerator:
        id, platform = 3, "gpu"

        def memory_stats(self):
            return {"bytes_limit": 7 * GB, "bytes_in_use": 2 * GB}

    built = built_on(1, images)
    monkeypatch.setitem(vars(built.mesh), "local_devices", [Accelerator()])
    host(8 * GB)
    assert memory_check.free_room(built) == (5 * GB, "device 3 has 5.00 GB free")
    host(GB // 4)
    assert memory_check.free_room(built).size == 0


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_settings_that_fit(
    images, host, tmp_path, one_device
):
    workdir = tmp_path / "run"
    size = {"batch_size": 32, "data__image_size": 64, "data__resize": 80}
    config = tiny.config(images, **size, epochs=1, **tiny.RESNET)
    built = builder.build(parse(config), sharding.make_mesh())
    host(0)
    needed, rest = memory_check.need(built), -memory_check.free_room(built).size
    host(int(rest) + needed.total)
    memory_check.check(built, workdir)
    # A quarter of the pixels fits, and so do a few micro-batches.
    tight = int(rest) + needed.fixed + needed.temporary // 3
    host(tight)
    with pytest.raises(ValueError, match=r"a training step needs .* the host has .* free") as error:
        run.train(config, workdir)
    assert not workdir.exists()
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert "--config.data.image_size=32 --config.data.resize=40" in lines
    # The CPU compiler of JAX 0.10 does not keep the order of the micro-batches.
    parts = [line for line in lines if line.startswith("--config.micro_batches=")]
    assert len(parts) == (jax.__version_info__ >= (0, 12))
    for at, line in enumerate(lines):
        other = changed(config, line)
        assert memory_check.need(builder.build(parse(other), built.mesh)).total <= tight - rest
        assert run.train(other, tmp_path / str(at))["last"]["epoch"] == 1


def changed(config, line):
    """Returns a config with the settings of a line of arguments."""
    pairs = (word.removeprefix("--config.").split("=") for word in line.split())
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(
        {
            name: value if value.isalnum() and value.islower() else json.loads(value.lower())
            for name, value in pairs
        }
    )
    return other


@pytest.mark.slow
def test_half_precision_is_proposed_if_the_memory_of_memvir_is_too_large(images, host, one_device):
    ring = {"memvir__num_steps": 30, "memvir__step_gap": 9, "model__dim": 512}
    built = built_on(1, images, "memvir", epochs=9, **ring)
    host(0)
    needed, rest = memory_check.need(built), -memory_check.free_room(built).size
    arrays = jax.tree.leaves(built.abstract_state.memory)
    kept = sum(x.size * x.dtype.itemsize for x in arrays if x.ndim == 3)
    host(int(rest + needed.total - 0.45 * kept))
    with pytest.raises(ValueError, match=r"\n  --config.memvir.dtype=bfloat16(\n|$)"):
        memory_check.check(built, Path("nowhere"))


@pytest.mark.slow
def test_a_resumed_run_is_offered_only_settings_that_may_change(images, host, tmp_path, one_device):
    workdir = tmp_path / "run"
    size = {"batch_size": 32, "data__image_size": 64, "data__resize": 80}
    run.train(tiny.config(images, epochs=1, **size), workdir)
    longer = tiny.config(images, epochs=2, **size)
    built = builder.build(parse(longer), sharding.make_mesh())
    host(0)
    needed, rest = memory_check.need(built), -memory_check.free_room(built).size
    host(int(rest) + needed.fixed + needed.temporary // 3)
    with pytest.raises(ValueError, match="a training step needs") as error:
        run.train(longer, workdir)
    proposed = re.findall(r"--config\.([a-z_.]+)=", str(error.value))
    assert set(proposed) <= {"model.remat"}
    assert run_directory.read_result(workdir)["last"]["epoch"] == 1


@pytest.mark.slow
def test_the_defaults_of_the_folder_config_fit_into_6_gb(host, tmp_path):
    for number in range(64):
        path = tmp_path / "images" / "train" / f"class{number % 8}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "test")
    config = folder.get_config("ps_memvir")
    config.data.root = str(tmp_path / "images")
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    resident = 1 * GB  # Of a process that has compiled: 0.9 GB were seen.
    host(6 * GB - resident)
    needed = memory_check.need(built)
    # The memory of a step may be held four times.
    assert needed.fixed + 4 * needed.temporary < memory_check.free_room(built).size


LARGE = {
    "batch_size": 32,
    "epochs": 1,
    "data.image_size": 128,
    "data.resize": 128,
    "model.width": 192,
}


def limited(images, workdir, *settings):
    """Returns the finished process of train.py with a memory limit."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.helpers.limited",
            f"--workdir={workdir}",
            *tiny.arguments(images, **{k.replace(".", "__"): v for k, v in LARGE.items()}),
            *settings,
        ],
        cwd=ROOT,
        env=os.environ | {"DML_JAX_TEST_BYTES": str(2 * GB)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_process_with_a_memory_limit_trains_with_the_proposed_settings(images, tmp_path):
    workdir = tmp_path / "run"
    refused = limited(images, workdir)
    assert refused.returncode == 2, refused.stderr
    assert "RLIMIT_DATA has" in refused.stderr and "Traceback" not in refused.stderr
    assert not workdir.exists()
    lines = [x.split() for x in refused.stderr.splitlines() if x.startswith("  --config.")]
    assert any("image_size" in line[0] for line in lines)
    for at, line in enumerate(lines):
        done = limited(images, tmp_path / str(at), *line)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / str(at) / run_directory.RESULT).exists()
