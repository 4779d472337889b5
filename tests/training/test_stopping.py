import os
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from dml_jax import sharding
from dml_jax.training import checkpoint, experiment, run, stopping, workdir
from tests import tiny

NETWORK = {"model__backbone": "colours", "model__width": None, "model__stem": None}


def final_state(folder):
    built = experiment.build(workdir.read_config(folder), sharding.make_mesh())
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.find("last"), experiment.abstract_state(built))


@pytest.mark.parametrize("batch", [2, 6, 8])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_with_the_same_bytes(
    tmp_path, monkeypatch, batch
):
    images = tiny.write_images(tmp_path / "images")
    config = tiny.config(images, "ps_memvir", epochs=3, **NETWORK)
    expected = run.run(config, tmp_path / "undisturbed")

    put_batch, calls = sharding.put_batch, []

    def asking(mesh, rows):
        calls.append(rows)
        if len([x for x in calls if "label" in x]) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # The watcher's turn.
        return put_batch(mesh, rows)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "put_batch", asking)
        # One batch is sent ahead.
        step = max(batch - 1, 1)
        with pytest.raises(stopping.Stopped, match=f"stopped after step {step}, which is saved"):
            run.run(config, folder)
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == step
    assert not (folder / workdir.RESULT).exists()
    assert run.run(config, folder) == expected
    chex.assert_trees_all_equal(final_state(folder), final_state(tmp_path / "undisturbed"))
    for name in (workdir.METRICS, workdir.RESULT):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


LISTENER = """
import time
from dml_jax.training import stopping
with stopping.listening() as asked:
    print("listening", flush=True)
    asked.wait()
    print("asked", flush=True)
    sum(range(10**12))  # As busy as a compiler: no handler of Python's has its turn.
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(second):
    process = subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # As some schedulers do: one request.
    assert process.stdout.readline() == b"asked\n"
    time.sleep(stopping._ONE_REQUEST + 0.1)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=10) == 128 + second
    process.stdout.close()


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stopping.listening() as asked:
        assert not asked.is_set()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_several_processes_learn_late_what_one_wants(monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:2])
    agreement = sharding.Agreement(mesh, steps_late=3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        sharding,
        "put_batch",
        lambda mesh, rows: {
            # This process, which says nothing, and another.
            name: jax.device_put(np.array([False, len(said) == 2]), sharding.by_row(mesh))
            for name in rows
        },
    )
    said = []
    stops = []
    for step in range(1, 8):
        stops.append(agreement.after(step, wanted=False))
        said.append(step)
    assert stops == [False] * 5 + [True, False]


def test_a_notice_of_preemption_from_jax_stops(monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:2])
    agreement = sharding.Agreement(mesh, steps_late=0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        sharding.multihost_utils, "reached_preemption_sync_point", lambda step: step == 2
    )
    monkeypatch.setattr(
        sharding,
        "put_batch",
        lambda mesh, rows: jax.device_put(dict(rows), sharding.by_row(mesh)),
    )
    assert [agreement.after(step, wanted=False) for step in (1, 2, 3)] == [False, True, False]
