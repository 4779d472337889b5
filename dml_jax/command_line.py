"""What the programs in scripts/ share: how they start, and how they speak of errors."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags, logging


def run(main: Callable[..., None], *arguments: str) -> None:
    """Parses the flags and runs a program.

    Args:
        main: the program.
        arguments: what its arguments are called, in their order; it takes them as strings. Of the
            last there may be several where its name ends in "...".
    """
    logging.set_verbosity(logging.WARNING)

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
        several = bool(arguments) and arguments[-1].endswith("...")
        if len(given) > len(arguments) and not several:
            unexpected = given[len(arguments)]
            _exit(f"unexpected argument {unexpected!r}; settings are given as --name=value", 2)
        if len(given) < len(arguments):
            _exit(f"the argument {arguments[len(given)]!r} is missing; --help tells more", 2)
        main(*given)

    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """Around work in which an error is the user's to mend: tells it in short, with exit code 2.

    Settings, files and images are checked there. A loss that is no longer finite ends with exit
    code 3. `--verbosity=1` adds the traceback.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _exit(f"{error}\n(--verbosity=1 shows where)", 2)
    except FloatingPointError as error:
        _exit(error, 3)


def _exit(error: object, code: int) -> NoReturn:
    logging.debug("traceback", exc_info=True)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
