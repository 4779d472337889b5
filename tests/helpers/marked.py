"""scripts/train.py, which says what it does: for tests that disturb it at that moment.

DML_JAX_TEST_DOES names a file that holds `step`, `evaluation` or nothing; DML_JAX_TEST_STOPS=N has
the process ask itself to stop during step N.
"""

import os
import signal
import time
from pathlib import Path

import jax

from dml_jax.cli import command_line, train
from dml_jax.evaluation import scoring
from dml_jax.training import step


def says(what, work):
    """The same work, which says when it begins and when it has ended."""
    file = Path(os.environ["DML_JAX_TEST_DOES"])

    def saying(*arguments):
        file.write_text(what)
        done = jax.block_until_ready(work(*arguments))
        file.write_text("")
        return done

    return saying


class Marked(step.Step):
    """A step that says when it is taken."""

    calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        if str(self.calls) == os.environ.get("DML_JAX_TEST_STOPS"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return says("step", super().__call__)(*arguments)


if __name__ == "__main__":
    step.Step = Marked
    scoring.Evaluator.embed = says("evaluation", scoring.Evaluator.embed)
    command_line.run(train.main)
