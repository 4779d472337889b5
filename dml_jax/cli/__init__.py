"""The programs. Each starts as `dml-jax NAME`, `python -m dml_jax NAME` or `scripts/FILE.py`."""

import importlib
import sys

from dml_jax._utils.errors import MissingExtraError

PROGRAMS = {
    "train": "train",
    "evaluate": "evaluate",
    "embed": "embed",
    "index": "index",
    "search": "search",
    "report": "report",
    "export": "export",
    "push": "push",
    "reproduce": "reproduce",
    "paper": "paper",
    "sweep": "sweep",
    "study": "study",
    "compile": "compile",
    "prepare": "prepare_data",
    "convert": "convert_weights",
    "quickstart": "quickstart",
}
"""By program: its module in this package."""

_STOPPABLE = ("train", "reproduce", "paper", "sweep", "study", "quickstart")


def launch(module: str, program: str) -> None:
    """Runs a program, except in a worker process, which imports the started file again.

    Args:
        module: the `__name__` of the started file; in a worker it is not "__main__".
        program: a key of `PROGRAMS`.
    """
    # The imports take seconds, and the signal to stop may arrive during them.
    if program in _STOPPABLE:
        from dml_jax.training import preemption

        preemption.expect(module)
    if module == "__main__":
        try:
            started = importlib.import_module(f"dml_jax.cli.{PROGRAMS[program]}")
        except MissingExtraError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        started.start()
