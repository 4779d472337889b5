"""scripts/train.py that records its current phase, for tests that interrupt it there.

DML_JAX_TEST_PHASE is the path of a file that contains `step`, `evaluation` or nothing. With
DML_JAX_TEST_STOPS=N the process sends itself SIGTERM during step N. With DML_JAX_TEST_FAILS=N it
raises an error then, with `save` or `evaluation` in the first one.
"""

import os
import signal
import time
from pathlib import Path

import jax

from dml_jax.cli import command_line, train
from dml_jax.evaluation import scoring
from dml_jax.training import checkpoint, step


def recorded(phase, function):
    """Returns a function that records the phase while it runs."""
    file = Path(os.environ["DML_JAX_TEST_PHASE"])

    def recorded_function(*arguments):
        file.write_text(phase)
        result = jax.block_until_ready(function(*arguments))
        file.write_text("")
        return result

    return recorded_function


class Marked(step.Step):
    """A step that records when it runs."""

    calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        if str(self.calls) == os.environ.get("DML_JAX_TEST_STOPS"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        if str(self.calls) == os.environ.get("DML_JAX_TEST_FAILS"):
            fail()
        return recorded("step", super().__call__)(*arguments)


def fail(*_):
    """Fails like a disk."""
    raise OSError("a disk has failed")


if __name__ == "__main__":
    step.Step = Marked
    if os.environ.get("DML_JAX_TEST_FAILS") == "save":
        checkpoint.Checkpoints.save = fail
    if os.environ.get("DML_JAX_TEST_FAILS") == "evaluation":
        scoring.Evaluator.embed = fail
    scoring.Evaluator.embed = recorded("evaluation", scoring.Evaluator.embed)
    command_line.run(train.main)
