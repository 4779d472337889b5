"""Programs that are asked to stop, as a scheduler asks them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from dml_jax.training import stopping, workdir
from tests import tiny

ROOT = Path(__file__).parents[1]


def start(images, folder, *flags, **settings):
    # In a process group of its own, which a test may signal as a whole.
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
    path = folder / workdir.METRICS
    while len(workdir.read_lines(path)) < number and process.poll() is None:
        time.sleep(0.01)


def test_a_signal_to_the_whole_group_stops_a_run_and_only_one_process_trains(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    folder = tmp_path / "run"
    settings = {"epochs": 1000, "evaluation__every_epochs": 500, "data__num_workers": 1}
    process = start(images, folder, **settings)
    wait_for_lines(folder, process)
    second = start(images, folder, **settings)
    _, errors = second.communicate(timeout=600)
    assert second.returncode == 2 and "another process is training in" in errors, errors
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == stopping.EXIT_CODE, errors
    step = int(re.search(r"stopped after step (\d+), which is saved", errors)[1])
    assert (folder / workdir.CHECKPOINTS / str(step)).is_dir()
    assert "Traceback" not in errors


def test_two_processes_stop_at_the_same_step_when_one_is_asked(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [f"--coordinator={address}", "--num_processes=2"]
    settings = {"epochs": 1000, "evaluation__every_epochs": 500}
    processes = [
        start(images, folder, *joined, f"--process_id={number}", **settings) for number in range(2)
    ]
    wait_for_lines(folder, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [stopping.EXIT_CODE] * 2, errors
    stops = [re.search(r"stopped after step (\d+), which is saved", text)[1] for text in errors]
    assert stops[0] == stops[1]
    assert (folder / workdir.CHECKPOINTS / stops[0]).is_dir()
