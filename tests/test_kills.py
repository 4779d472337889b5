"""A run that is killed at many moments, again and again, is the run that was not."""

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

from dml_jax._utils import sharding
from dml_jax.training import builder, checkpoint, run_directory
from dml_jax.training.config import parse
from tests.helpers import tiny

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 120  # Seconds that anything may take on a busy machine.

# What to wait for before the kill, and for how many seconds after it at most.
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


def marked(mark):
    """The processes that have a mark in their environment, as all children of a run do."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # It has ended.
    return found


def changed_since(path, begun):
    try:
        return path.stat().st_mtime_ns > begun
    except FileNotFoundError:
        return False


def has_come(moment, folder, does, begun):
    if moment == "start":
        return True
    if moment == "loop":
        # The file is opened anew when the loop begins.
        return changed_since(folder / run_directory.METRICS, begun)
    if moment == "save":
        # Not one that an earlier kill has left.
        unfinished = (folder / run_directory.CHECKPOINTS).glob("*orbax-checkpoint-tmp*")
        return any(changed_since(path, begun) for path in unfinished)
    return changed_since(does, begun) and does.read_text() == moment


def state(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]


def strike(process, come, wait):
    """Kills a process at a moment; whether it was that moment, which a halted one cannot leave."""
    while process.poll() is None:
        if not come():
            time.sleep(0.0005)
            continue
        time.sleep(wait())
        process.send_signal(signal.SIGSTOP)
        while state(process) not in "TZ":
            time.sleep(0.0005)
        if come():
            process.kill()
            return process.wait() == -signal.SIGKILL
        process.send_signal(signal.SIGCONT)
    return False


def unmapped(names):
    """Of shared memory, what no process has."""
    maps = ""
    for process in Path("/proc").iterdir():
        try:
            maps += (process / "maps").read_text() if process.name.isdecimal() else ""
        except OSError:
            continue
    return [name for name in names if name not in maps]


def final_state(folder):
    built = builder.build(parse(run_directory.read_config(folder)), sharding.make_mesh())
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.find("last"), builder.abstract_state(built))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_killed_twenty_times_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    subprocess.run(training(images, undisturbed), check=True, **quiet)

    mark = f"DML_JAX_TEST={uuid.uuid4()}"
    does = tmp_path / "does"
    environment = os.environ | dict([mark.split("="), ("DML_JAX_TEST_DOES", str(does))])
    shared = set(SHARED_MEMORY.iterdir())
    rng = random.Random(0)
    moments = rng.sample(MOMENTS, len(MOMENTS))
    for moment, spread in moments:
        begun = time.time_ns()
        program = training(images, folder, ("-m", "tests.helpers.marked"))
        process = subprocess.Popen(program, env=environment, **quiet)
        assert strike(
            process,
            functools.partial(has_come, moment, folder, does, begun),
            functools.partial(rng.uniform, 0, spread),
        ), f"it was over before it could be killed at the moment {moment}"
        # Started again at once, while the workers of the last one are ending.
    assert not (folder / run_directory.RESULT).exists()

    subprocess.run(training(images, folder), env=environment, check=True, **quiet)
    chex.assert_trees_all_equal(final_state(folder), final_state(undisturbed))
    for name in (run_directory.METRICS, run_directory.RESULT):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not (folder / run_directory.DAMAGED).exists()

    deadline = time.monotonic() + PATIENCE
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(mark)
    assert not unmapped(path.name for path in set(SHARED_MEMORY.iterdir()) - shared)
