"""Loads the network of a trained run, and what it knows of its training classes."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Integer, PyTree

from dml_jax import data, losses, memvir
from dml_jax._utils import sharding
from dml_jax.evaluation.embedding import embed_images
from dml_jax.evaluation.network import Network
from dml_jax.training import builder, checkpoint, run_directory
from dml_jax.training.builder import Experiment, make_network
from dml_jax.training.checkpoint import read_network
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables


def load(
    folder: Path, name: str, mesh: jax.sharding.Mesh
) -> tuple[Network, dict[str, PyTree], int]:
    """Loads the network of a run from its configuration and a checkpoint.

    Args:
        folder: folder of the run.
        name: name of the checkpoint; see `checkpoint.check_name`.
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


class TrainingState(NamedTuple):
    """What a checkpoint holds of the training classes."""

    step: int
    variables: dict[str, PyTree]
    """The variables of the network: the average, if any."""
    proxies: Float32[np.ndarray, "proxies pdim"]
    """Raw proxies of the training classes."""
    memory: memvir.Memory | None
    """None without MemVir, and if it was not asked for."""


def build(folder: Path) -> Experiment:
    """Returns the experiment of a run, with its images, on one device.

    Raises:
        FileNotFoundError: the folder holds no run, or the images are not where it says.
        ValueError: a setting or an image is invalid.
    """
    config = parse(run_directory.read_config(folder))
    device = sharding.make_mesh(jax.local_devices()[:1])
    return builder.build(config, device, run_directory.read_inspection(folder))


def read_training_state(
    built: Experiment, folder: Path, name: str, *, with_memory: bool = False
) -> TrainingState:
    """Reads the network, the proxies and, if asked for, the memory from a checkpoint.

    Args:
        built: the experiment of the run; see `build`.
        folder: folder of the run.
        name: name of the checkpoint; see `checkpoint.check_name`.
        with_memory: whether to read MemVir's memory, which may be large.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or the loss has no proxies.
    """
    per_class = losses.of_proxies(built.config.loss).proxies_per_class
    everything = built.abstract_state
    names = ["params", "batch_stats", "average", *(["memory"] if with_memory else [])]
    wanted = {name: getattr(everything, name) for name in names}
    step, values = checkpoint.read(folder, name, wanted)
    found = everything._replace(**{"memory": None, **values})
    proxies, memory = jax.device_get((found.params["proxies"], found.memory))
    count = built.step_config.num_classes * per_class
    return TrainingState(step, network_variables(found), proxies[:count], memory)


def embed_some(
    built: Experiment,
    state: TrainingState,
    source: data.Source,
    images: Integer[np.ndarray, " n"],
) -> Float32[np.ndarray, "n d"]:
    """Returns the raw embeddings of some images of a source, given by their indices."""
    some = data.Source(
        records=[source.records[int(i)] for i in images],
        labels=source.labels[images],
        class_names=source.class_names,
        names=tuple(source.names[i] for i in images),
    )
    return embed_images(built.network, state.variables, some)
