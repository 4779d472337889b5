"""What the programs in scripts/ share: how they start, and how they speak of errors."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from dml_jax._utils import runtime
from dml_jax.training import preemption


def run(
    main: Callable[..., None], *arguments: str, many: str | None = None, embeds: bool = False
) -> None:
    """Parses the flags and runs a program.

    Args:
        main: the program.
        arguments: what its arguments are called, in their order; it takes them as strings.
        many: what further arguments are called, if there may be any number of them.
        embeds: see `runtime.prepare`.
    """
    _show_in_help(main)
    logging.set_verbosity(logging.WARNING)
    runtime.prepare(embeds=embeds)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        # A mistyped --config.name is an AttributeError or a KeyError of ml_collections.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            message = str(error.args[0] if isinstance(error, KeyError) else error).strip()
            # What went wrong inside a config file comes behind its whole traceback.
            _exit(message.splitlines()[-1] if "Traceback" in message else message, 2)

    def guarded(argv: Sequence[str]) -> None:
        given = argv[1:]
        if len(given) > len(arguments) and many is None:
            unexpected = given[len(arguments)]
            _exit(f"unexpected argument {unexpected!r}; settings are given as --name=value", 2)
        if len(given) < len(arguments):
            _exit(f"the argument {arguments[len(given)]!r} is missing; --help tells more", 2)
        main(*given)

    app.run(guarded, flags_parser=parse)


def _show_in_help(main: Callable[..., None]) -> None:
    """Has --help show the docstring and the flags of the program, not those of its launcher."""
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around work in which an error is the user's to mend: tells it in short, with exit code 2.

    Settings, files and images are checked there. Steps that are no longer finite end with exit
    code 3, a run that was asked to stop with 75. `--verbosity=1` adds the traceback. A ValueError
    that nobody raised on purpose is ours to mend: it passes, and ends with its traceback and exit
    code 1.
    """
    try:
        yield
    except preemption.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ValueError) and not _on_purpose(error):
            raise
        _exit(f"{error}\n(--verbosity=1 shows where)", 2)
    except FloatingPointError as error:
        _exit(error, 3)


def _on_purpose(error: ValueError) -> bool:
    """Whether a `raise` of this project is where an error began, not some operation that failed."""
    origin = traceback.extract_tb(error.__traceback__)[-1]
    folders = Path(__file__).parent, Path(sys.argv[0]).resolve().parent
    ours = any(Path(origin.filename).is_relative_to(folder) for folder in folders)
    return ours and (origin.line or "").startswith("raise ")


def _exit(error: object, code: int) -> NoReturn:
    logging.debug("traceback", exc_info=True)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
