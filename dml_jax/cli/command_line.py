"""The command line of the programs: arguments, flags, errors and exit codes."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from dml_jax._utils import failures, runtime
from dml_jax._utils.errors import UserError
from dml_jax.cli import packaged_configs
from dml_jax.training import preemption


def run(
    main: Callable[..., None], *arguments: str, many: str | None = None, embeds: bool = False
) -> None:
    """Parses the command line and runs a program.

    Args:
        main: the program; it takes its positional arguments as strings.
        arguments: the names of the positional arguments, in order.
        many: the name of further arguments, if any number of them may follow.
        embeds: see `runtime.prepare`.
    """
    _show_in_help(main)
    logging.set_verbosity(logging.WARNING)
    runtime.prepare(embeds=embeds)

    def parse(argv: Sequence[str]) -> list[str]:
        with flag_errors():
            return flags.FLAGS(packaged_configs.resolve(argv))

    def guarded(argv: Sequence[str]) -> None:
        given = argv[1:]
        if len(given) > len(arguments) and many is None:
            unexpected = given[len(arguments)]
            _exit(f"unexpected argument {unexpected!r}; write settings as --name=value", 2)
        if len(given) < len(arguments):
            _exit(f"the argument {arguments[len(given)]!r} is missing; see --help", 2)
        main(*given)

    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Reports errors in the flags by their message alone and exits with code 2."""
    try:
        yield
    # ml_collections raises an AttributeError or a KeyError for a mistyped --config.name.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _exit(_parse_message(error), 2)


def numbers(flag: flags.FlagHolder, kind: type[int] | type[float]) -> list[Any]:
    """Returns the numbers of a flag that is a list, of type `kind`.

    Raises:
        ValueError: an item is no such number.
    """
    try:
        return [kind(item) for item in flag.value]
    except ValueError:
        name = "integers" if kind is int else "numbers"
        raise UserError(f"--{flag.name}={','.join(flag.value)} must be {name}") from None


def _show_in_help(main: Callable[..., None]) -> None:
    """Makes --help show the docstring and the flags of the program instead of its launcher's."""
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse_message(error: BaseException) -> str:
    """Returns the message of an error in the flags, without the traceback through a config file."""
    # ml_collections puts the traceback of an error in a config file into its own message.
    while "Traceback" in str(error) and error.__context__ is not None:
        error = error.__context__
    return str(error.args[0] if isinstance(error, KeyError) else error).strip()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Reports errors that the user can fix by their message alone and exits with code 2.

    These are `UserError`, an OSError and a missing package; `--verbosity=1` adds the traceback.
    Exit code 3 means that training values became nonfinite; 75 that the run was asked to stop and
    has saved a checkpoint. Other errors, among them any other ValueError, are bugs: they pass, and
    the program ends with the traceback and exit code 1. A failure of one of several processes ends
    all of them with the same exit code.
    """
    try:
        yield
    except preemption.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except (UserError, OSError, ModuleNotFoundError) as error:
        _exit(f"{error}\n(--verbosity=1 shows the traceback)", 2)
    except FloatingPointError as error:
        _exit(error, 3)
    except Exception as error:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            failures.end_all(repr(error), 1)
        raise


def _exit(error: object, code: int) -> NoReturn:
    logging.debug("traceback", exc_info=True)
    print(f"error: {error}", file=sys.stderr)
    failures.end_all(str(error), code)
    sys.exit(code)
