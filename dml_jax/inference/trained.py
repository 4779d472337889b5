"""Loads the network of a trained run."""

from pathlib import Path

import jax
from jaxtyping import PyTree

from dml_jax.evaluation.network import Network
from dml_jax.training import run_directory
from dml_jax.training.builder import make_network
from dml_jax.training.checkpoint import read_network
from dml_jax.training.config import parse


def load(
    folder: Path, name: str, mesh: jax.sharding.Mesh
) -> tuple[Network, dict[str, PyTree], int]:
    """Loads the network of a run from its configuration and a checkpoint.

    Args:
        folder: folder of the run.
        name: name of the checkpoint: `last`, or a key of `checkpoint.BEST`.
        mesh: the devices to run on.

    Returns:
        The network, its variables, and the step of the checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run, or the run no such checkpoint.
        ValueError: its configuration is damaged.
    """
    config = parse(run_directory.read_config(folder))
    network = make_network(config, mesh)
    step, variables = read_network(network, folder, name)
    return network, variables, step
