"""One of several processes that exchange a value again and again; the one named `FAILS` fails.

python -m tests.helpers.failing ADDRESS PROCESSES INDEX FAILS HOW
"""

import os
import signal
import sys
import time

from dml_jax._utils import processes
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line


def fail(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("no space is left") if how == "user error" else KeyError("a bug")


def main(address, count, index, fails, how):
    with command_line.user_errors():
        processes.join_processes(
            coordinator=address, num_processes=int(count), process_id=int(index)
        )
        for step in range(600):
            if step == 3 and index == fails:
                fail(how)
            processes.any_process(False)
            time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
