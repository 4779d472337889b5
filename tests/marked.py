"""scripts/train.py, which says what it does: for tests that disturb it at that moment.

DML_JAX_TEST_DOES names a file that holds `step`, `evaluation` or nothing; DML_JAX_TEST_STOPS=N has
the process ask itself to stop during step N.
"""

import os
import signal
import time
from pathlib import Path

import jax

from dml_jax import command_line
from dml_jax.training import loop
from scripts import train


def says(what, work):
    """The same work, which says when it begins and when it has ended."""
    file = Path(os.environ["DML_JAX_TEST_DOES"])

    def saying(*arguments):
        file.write_text(what)
        done = jax.block_until_ready(work(*arguments))
        file.write_text("")
        return done

    return saying


def compiled(*arguments):
    calls, step = [], compile_step(*arguments)
    says_so = says("step", step)

    def counting(*arguments):
        calls.append(None)
        if str(len(calls)) == os.environ.get("DML_JAX_TEST_STOPS"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        # The first call compiles.
        return says_so(*arguments) if len(calls) > 1 else step(*arguments)

    return counting


if __name__ == "__main__":
    compile_step, loop.compile_step = loop.compile_step, compiled
    loop.embed_split = says("evaluation", loop.embed_split)
    command_line.run(train.main)
