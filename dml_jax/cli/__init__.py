"""The programs, each started by `dml-jax NAME`, `python -m dml_jax NAME` or a file in scripts/."""

import importlib

PROGRAMS = {
    "train": "train",
    "evaluate": "evaluate",
    "embed": "embed",
    "index": "index",
    "search": "search",
    "report": "report",
    "export": "export",
    "reproduce": "reproduce",
    "prepare": "prepare_data",
    "convert": "convert_weights",
    "quickstart": "quickstart",
}
"""The module in this package of each program."""

_STOPPABLE = ("train", "reproduce", "quickstart")


def launch(module: str, program: str) -> None:
    """Runs a program if this process was started for it, and not as a worker of its.

    Args:
        module: the `__name__` of the file that was started.
        program: a key of `PROGRAMS`.
    """
    # The imports take seconds, in which training may be asked to stop already.
    if program in _STOPPABLE:
        from dml_jax.training import preemption

        preemption.expect(module)
    if module == "__main__":
        importlib.import_module(f"dml_jax.cli.{PROGRAMS[program]}").start()
