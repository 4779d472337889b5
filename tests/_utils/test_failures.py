import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "fails", "code", "reason"),
    [
        ("user error", 0, 2, "process 0 failed: no space is left"),
        ("user error", 2, 2, "process 2 failed: no space is left"),
        ("bug", 2, 1, "process 2 failed: KeyError('a bug')"),
        ("killed", 0, None, "JAX distributed service"),
        ("killed", 2, None, "onnection"),
    ],
)
def test_all_processes_end_if_one_fails(how, fails, code, reason):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = [sys.executable, "-m", "tests.helpers.failing", address, str(COUNT)]
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [*program, str(index), str(fails), how],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(COUNT)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert time.monotonic() - started < 100  # The last of 600 exchanges would be later.
    codes = [process.returncode for process in running]
    if how == "killed":
        assert codes.pop(fails) == -signal.SIGKILL
        assert all(codes)
    else:
        assert codes == [code] * COUNT
    for index in set(range(COUNT)) - {fails}:
        assert reason in errors[index]
