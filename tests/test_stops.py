"""Training programs that receive SIGTERM, as from a scheduler."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from dml_jax._utils import files
from dml_jax.training import preemption, run_directory
from tests.helpers import tiny
from tests.helpers.processes import marked

ROOT = Path(__file__).parents[1]


def start(images, folder, *flags, **settings):
    # In a new session, whose process group a test may signal.
    arguments = tiny.arguments(images, "ps_memvir", **settings)
    return subprocess.Popen(
        [sys.executable, "scripts/train.py", f"--workdir={folder}", *arguments, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(folder, process, number=1):
    path = folder / run_directory.METRICS
    while len(files.read_json_lines(path)) < number and process.poll() is None:
        time.sleep(0.01)


def worker_of(process):
    # Any thread of the process may have started the worker.
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(child) for thread in threads for child in thread.read_text().split()]
    (found,) = (x for x in children if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes())
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_signal_to_the_process_group_stops_a_run_and_only_one_process_trains(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    folder = tmp_path / "run"
    settings = {"epochs": 1000, "evaluation__every_epochs": 500, "data__num_workers": 1}
    process = start(images, folder, **settings)
    wait_for_lines(folder, process)
    with (
        pytest.raises(ValueError, match="another process is training"),
        run_directory.locked(folder),
    ):
        pass
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == preemption.EXIT_CODE, errors
    step = int(re.search(r"stopped after step (\d+), which is saved", errors)[1])
    assert (folder / run_directory.CHECKPOINTS / str(step)).is_dir()
    assert "Traceback" not in errors

    # An image that is damaged after the inspection, and a worker that is killed.
    image = images / "train" / "class3" / "2.png"
    content = image.read_bytes()
    image.write_bytes(bytes(len(content)))
    _, errors = start(images, folder, **settings).communicate(timeout=600)
    assert "class3/2.png" in errors and "Traceback" not in errors
    image.write_bytes(content)
    process = start(images, folder, **settings)
    wait_for_lines(folder, process, len(files.read_json_lines(folder / run_directory.METRICS)) + 1)
    os.kill(worker_of(process), signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "which read images, was ended by SIGKILL" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for signals in /proc")
def test_a_signal_before_the_first_step_ends_a_run_at_once(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    folder = tmp_path / "run"
    moments = (handles_signals, lambda process: (folder / run_directory.CONFIG).exists())
    for reached in moments:
        assert not folder.exists()
        process = start(images, folder)
        while not reached(process) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == preemption.EXIT_CODE, errors
        assert "Traceback" not in errors
    assert not (folder / run_directory.CHECKPOINTS / "4").exists()


def handles_signals(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return caught >> (signal.SIGTERM - 1) & 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core trains one at a time")
def test_a_signal_stops_the_quickstart_and_all_its_runs(tmp_path):
    mark = f"MARK_{uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dml_jax", "quickstart", f"--root={tmp_path}", "--epochs=50"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {mark: "1"},
    )
    for variant in ("baseline", "ps"):
        wait_for_lines(tmp_path / variant, process)
    os.kill(process.pid, signal.SIGTERM)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == preemption.EXIT_CODE, errors
    assert errors.rstrip().endswith("start again to resume") and "Traceback" not in errors
    assert not marked(mark)
    for variant in ("baseline", "ps"):
        assert re.search(rf"^{variant}: stopped after step \d+, which is saved", printed, re.M)
        assert any((tmp_path / variant / run_directory.CHECKPOINTS).iterdir())
