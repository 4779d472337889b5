"""Forks: runs that start from the network of another run."""

from pathlib import Path

from jaxtyping import PyTree

from dml_jax._utils import storage
from dml_jax._utils.errors import UserError
from dml_jax._utils.files import read_json
from dml_jax.evaluation.network import Network
from dml_jax.training import checkpoint, run_directory
from dml_jax.training.bucket import copy
from dml_jax.training.builder import Experiment
from dml_jax.training.run_directory import CONFIG, FORK
from dml_jax.training.state import TrainState, with_network


def forked_from(workdir: Path, given: str | Path | None) -> str | None:
    """Returns the run that a run is forked from; None if it is not a fork.

    Args:
        workdir: directory of the run; it need not exist.
        given: directory or URL of the other run as given by the user; not needed when resuming.

    Raises:
        ValueError: the run in the workdir was forked from another run, or from none.
    """
    contents = read_json(workdir / FORK)
    exists = (workdir / CONFIG).exists()
    recorded = contents["from"] if exists and contents else None
    given = None if given is None else storage.absolute(str(given))
    if exists and given not in (None, recorded):
        raise UserError(f"{workdir} holds a run that was forked from {recorded}, not from {given}")
    return recorded if exists else given


def initial_state(experiment: Experiment, fork: str | None) -> TrainState:
    """Returns the state before the first step of a run, with the network of another run if given.

    Args:
        experiment: experiment of the run.
        fork: directory or URL of the other run.

    Raises:
        FileNotFoundError: there is no run or no checkpoint in it, or no file of weights.
        ValueError: the other run trains a different network, or the weights do not fit.
    """
    state = experiment.init()
    if fork is None:
        return state
    variables = read_fork(experiment.network, copy(fork))
    return with_network(state, variables)


def read_fork(network: Network, workdir: Path) -> dict[str, PyTree]:
    """Reads the variables of the network from the last checkpoint of another run.

    Args:
        network: the network that starts with these variables.
        workdir: directory of the other run.

    Raises:
        FileNotFoundError: there is no run or no checkpoint in it.
        ValueError: the other run trains a different network.
    """
    ours, names = network.model, ("backbone", "width", "stem", "channels", "normalisation", "dim")
    theirs = run_directory.read_config(workdir).model
    for name in (*names, "lora_rank", "prompts"):
        if theirs[name] != getattr(ours, name):
            raise UserError(
                f"config.model.{name} is {getattr(ours, name)!r}, but the run to fork from, "
                f"{workdir}, has {theirs[name]!r}"
            )
    return checkpoint.read_network(network, workdir, "last")[1]
