"""Starts a program: `python -m dml_jax PROGRAM`, the same as `dml-jax PROGRAM`."""

import sys

from dml_jax.cli import PROGRAMS, launch


def start(module: str = "__main__") -> None:
    """Runs the program that the first argument names, or prints the usage.

    Args:
        module: the `__name__` of the started file; see `cli.launch`.
    """
    program = sys.argv[1] if len(sys.argv) > 1 else ""
    if program in PROGRAMS:
        sys.argv[:2] = [f"dml-jax {program}"]
        launch(module, program)
    elif module == "__main__":
        usage = f"usage: dml-jax PROGRAM [--help | ARGUMENTS]; programs: {', '.join(PROGRAMS)}"
        print(usage, file=sys.stdout if program in ("--help", "-h") else sys.stderr)
        sys.exit(0 if program in ("--help", "-h") else 2)


if __name__ in ("__main__", "__mp_main__"):
    start(__name__)
