"""Forks: runs that start from the network of another run."""

from pathlib import Path

from jaxtyping import PyTree

from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json
from dml_jax.evaluation.network import Network
from dml_jax.training import checkpoint, run_directory
from dml_jax.training.run_directory import CONFIG, FORK


def forked_from(workdir: Path, given: Path | None) -> Path | None:
    """The run that a run has its first weights from; None if it has them from elsewhere.

    Args:
        workdir: the run's; it need not exist.
        given: what the user says, who need not say it again when a run goes on.

    Raises:
        ValueError: the run in the folder began in another way.
    """
    recorded = read_json(workdir / FORK)
    begun = (workdir / CONFIG).exists()
    there = Path(recorded["from"]) if begun and recorded else None
    given = None if given is None else given.absolute()
    if begun and given not in (None, there):
        raise UserError(f"{workdir} holds a run that was forked from {there}, not from {given}")
    return there if begun else given


def read_fork(network: Network, folder: Path) -> dict[str, PyTree]:
    """Reads the network's variables in the last checkpoint of another run.

    Args:
        network: that is to start with them.
        folder: the other run's.

    Raises:
        FileNotFoundError: there is no such run, or no checkpoint in it.
        ValueError: it trains another network.
    """
    there, here = run_directory.read_config(folder).model, network.model
    for name in ("backbone", "width", "stem", "channels", "dim"):
        if there.get(name) != getattr(here, name):
            raise UserError(
                f"config.model.{name} is {getattr(here, name)!r}, but {folder}, from which to "
                f"fork, has {there.get(name)!r}"
            )
    return checkpoint.read_network(network, folder, "last")[1]
