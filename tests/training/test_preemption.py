import os
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from dml_jax._utils import processes, sharding
from dml_jax.evaluation import scoring
from dml_jax.training import builder, checkpoint, loop, preemption, resume, run_directory
from dml_jax.training.config import parse
from tests.helpers import tiny


def train(config, folder):
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    resume.claim(folder, parse(config))
    with preemption.listening() as stop:
        return loop.train(built, folder, stop)


def final_state(config, folder):
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(checkpoints.find("last"), built.abstract_state)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    images = tiny.write_images(tmp_path_factory.mktemp("images"))
    return tiny.config(images, "ps_memvir", epochs=3)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(config, folder)
    return folder


@pytest.mark.parametrize("step", [6, 8])  # In the middle of an epoch, and at its end.
def test_a_preempted_run_saves_and_resumes_to_identical_files(
    config, uninterrupted, tmp_path, monkeypatch, step
):
    put_batch, sent = sharding.put_batch, []

    def put_and_signal(mesh, batch):
        sent.extend(name for name in batch if name == "label")
        if len(sent) == step + 1:  # One batch is transferred ahead.
            sent.append("signal")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # Until the watching thread has read the signal.
        return put_batch(mesh, batch)

    with monkeypatch.context() as patched:
        patched.setattr(sharding, "put_batch", put_and_signal)
        with pytest.raises(preemption.Stopped, match=f"stopped after step {step}, which is saved"):
            train(config, tmp_path)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == step
    assert not (tmp_path / run_directory.RESULT).exists()
    train(config, tmp_path)
    chex.assert_trees_all_equal(final_state(config, tmp_path), final_state(config, uninterrupted))
    for name in (run_directory.METRICS, run_directory.RESULT):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_a_run_preempted_in_its_last_evaluation_stops_before_the_result(
    config, uninterrupted, tmp_path, monkeypatch
):
    embed = scoring.Evaluator.embed

    def embed_and_signal(evaluator, variables, split):
        if jax.device_get(variables["batch_stats"]) and len(evaluated) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        evaluated.append(split)
        return embed(evaluator, variables, split)

    evaluated = []
    with monkeypatch.context() as patched:
        patched.setattr(scoring.Evaluator, "embed", embed_and_signal)
        with pytest.raises(preemption.Stopped, match="stopped after training"):
            train(config, tmp_path)
    assert len(evaluated) == 3 and not (tmp_path / run_directory.RESULT).exists()
    train(config, tmp_path)
    for name in (run_directory.METRICS, run_directory.RESULT):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


LISTENER = """
import hashlib, sys
from dml_jax.training import preemption
from dml_jax.training.config import parse
with preemption.listening() as stop:
    stop.unsaved = sys.argv[1] == "unsaved"
    if sys.argv[1] == "notebook":
        sys.ps1 = "In: "
    print("listening", flush=True)
    stop.wait()
    print("asked", flush=True)
    # Like a compiler, this keeps the main thread from running signal handlers.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


def listener(mode):
    process = subprocess.Popen([sys.executable, "-c", LISTENER, mode], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_ends_a_process_with_nothing_unsaved(first):
    process = listener("nothing")
    process.send_signal(first)
    assert process.wait(timeout=60) == preemption.EXIT_CODE
    process.stdout.close()


@pytest.mark.parametrize(
    ("mode", "second"),
    [("unsaved", signal.SIGTERM), ("unsaved", signal.SIGINT), ("notebook", signal.SIGINT)],
)
def test_a_second_signal_ends_the_process_at_once(mode, second):
    process = listener(mode)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # Within a second: one request.
    assert process.stdout.readline() == b"asked\n"
    time.sleep(preemption._ONE_REQUEST + 0.1)
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(timeout=60) == 128 + second
    process.stdout.close()


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with preemption.listening() as stop:
        assert not stop.is_set()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_all_processes_stop_some_steps_after_one_of_them_asks_to(monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:2])
    agreement = processes.Agreement(mesh, steps_late=3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes,
        "put_batch",
        lambda mesh, rows: {
            # This process does not ask to stop; the other one does in step 3.
            name: jax.device_put(np.array([False, len(steps) == 2]), sharding.batch_sharding(mesh))
            for name in rows
        },
    )
    steps = []
    stops = []
    for step in range(1, 8):
        stops.append(agreement.after(step, wanted=False))
        steps.append(step)
    assert stops == [False] * 5 + [True, False]


@pytest.mark.parametrize("count", [1, 2])
def test_a_preemption_notice_from_jax_stops_the_run(monkeypatch, count):
    mesh = sharding.make_mesh(jax.devices()[:2])
    agreement = processes.Agreement(mesh, steps_late=0)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(
        processes.multihost_utils, "reached_preemption_sync_point", lambda step: step == 2
    )
    monkeypatch.setattr(
        processes,
        "put_batch",
        lambda mesh, rows: jax.device_put(dict(rows), sharding.batch_sharding(mesh)),
    )
    assert [agreement.after(step, wanted=False) for step in (1, 2, 3)] == [False, True, False]
