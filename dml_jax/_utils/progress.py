"""A progress bar on the terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def shown(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on the terminal, if there is one, and removes it at the end.

    Args:
        description: what is being done.
        total: number of steps.

    Yields:
        A function that advances the bar by a number of steps.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
