"""A run that is killed many times ends like an uninterrupted run."""

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import chex
import pytest

from dml_jax._utils import sharding, storage
from dml_jax.training import bucket, builder, checkpoint, run_directory
from dml_jax.training.config import parse
from tests.helpers import object_storage, tiny
from tests.helpers.processes import marked

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
TIMEOUT = 120  # Seconds until all processes have ended, on a busy machine.

# The phase of the run to wait for, and the largest random delay in seconds before the kill.
MOMENTS = [
    *[("start", 3.0)] * 10,
    *[("loop", 4.0)] * 2,
    *[("step", 0.2)] * 3,
    *[("save", 0.02)] * 3,
    *[("evaluation", 1.0)] * 2,
]


def training(images, folder, program=("scripts/train.py",)):
    settings = {"epochs": 24, "evaluation__every_epochs": 8, "data__num_workers": 2}
    arguments = tiny.arguments(images, "ps_memvir", deterministic=True, **settings)
    return [sys.executable, *program, f"--workdir={folder}", *arguments]


def changed_since(path, start):
    try:
        return path.stat().st_mtime_ns > start
    except FileNotFoundError:
        return False


def is_in_phase(phase, folder, phase_file, start):
    if phase == "start":
        return True
    if phase == "loop":
        # The file is rewritten when the loop begins.
        return changed_since(folder / run_directory.METRICS, start)
    if phase == "save":
        # Temporary directories of earlier kills are older.
        unfinished = (folder / run_directory.CHECKPOINTS).glob("*orbax-checkpoint-tmp*")
        return any(changed_since(path, start) for path in unfinished)
    return changed_since(phase_file, start) and phase_file.read_text() == phase


def state(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]


def kill_in_phase(process, is_in_phase, delay):
    """Kills a process in a phase and returns whether it succeeded.

    The process is halted first, so that it cannot leave the phase between the check and the kill.
    """
    while process.poll() is None:
        if not is_in_phase():
            time.sleep(0.0005)
            continue
        time.sleep(delay())
        process.send_signal(signal.SIGSTOP)
        while state(process) not in "TZ":
            time.sleep(0.0005)
        if is_in_phase():
            process.kill()
            return process.wait() == -signal.SIGKILL
        process.send_signal(signal.SIGCONT)
    return False


def shared_memory():
    """Returns the names of shared memory, without what a kill left empty while it was made."""
    names = set()
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size:
                names.add(path.name)
    return names


def unmapped(names):
    """Returns the names of shared memory that no process maps."""
    maps = ""
    for process in Path("/proc").iterdir():
        try:
            maps += (process / "maps").read_text() if process.name.isdecimal() else ""
        except OSError:
            continue
    return [name for name in names if name not in maps]


@contextlib.contextmanager
def places(kind, tmp_path, monkeypatch):
    """Yields the workdir of the killed run, the folder in which its process works, and a reader."""
    if kind == "disk":
        yield tmp_path / "killed", tmp_path / "killed", Path
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_storage.served():
        url = storage.join(object_storage.new_bucket("s3"), "runs/killed")
        yield url, storage.local_folder(url, "runs/0"), bucket.copy
        # Nothing remains of interrupted uploads, and no lease.
        assert set(storage.names(url)) == set(bucket.published(storage.names(url)))


def final_state(folder):
    built = builder.build(parse(run_directory.read_config(folder)), sharding.make_mesh())
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.find("last"), built.abstract_state)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_run_killed_twenty_times_ends_bit_for_bit_like_an_uninterrupted_run(
    kind, tmp_path, monkeypatch
):
    with places(kind, tmp_path, monkeypatch) as (workdir, works_in, read):
        kill_twenty_times(tmp_path, workdir, works_in, read)


def kill_twenty_times(tmp_path, workdir, works_in, read):
    images = tiny.write_images(tmp_path / "images")
    uninterrupted = tmp_path / "uninterrupted"
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    subprocess.run(training(images, uninterrupted), check=True, **quiet)

    mark = f"DML_JAX_TEST={uuid.uuid4()}"
    phase_file = tmp_path / "phase"
    environment = os.environ | dict([mark.split("="), ("DML_JAX_TEST_PHASE", str(phase_file))])
    shared = shared_memory()
    rng = random.Random(0)
    moments = rng.sample(MOMENTS, len(MOMENTS))
    for phase, longest_delay in moments:
        start = time.time_ns()
        program = training(images, workdir, ("-m", "tests.helpers.marked"))
        process = subprocess.Popen(program, env=environment, **quiet)
        assert kill_in_phase(
            process,
            functools.partial(is_in_phase, phase, works_in, phase_file, start),
            functools.partial(rng.uniform, 0, longest_delay),
        ), f"the run ended before it could be killed in the phase {phase}"
        # The next run starts while the workers of the killed one are still ending.
    assert not (read(workdir) / run_directory.RESULT).exists()

    subprocess.run(training(images, workdir), env=environment, check=True, **quiet)
    folder = read(workdir)
    chex.assert_trees_all_equal(final_state(folder), final_state(uninterrupted))
    for name in (run_directory.METRICS, run_directory.RESULT):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert not (folder / run_directory.DAMAGED).exists()

    deadline = time.monotonic() + TIMEOUT
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(mark)
    assert not unmapped(shared_memory() - shared)
