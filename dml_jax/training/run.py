"""A whole run, from a configuration to its result."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dml_jax import sharding
from dml_jax.models import pretrained
from dml_jax.training import experiment, loop, workdir, writer


def run(config: ConfigDict, folder: Path, *, overview: bool = False) -> dict[str, Any]:
    """Trains what a configuration says, goes on with it, or finds that it is done.

    Args:
        config: a whole config.
        folder: the run's, new or with an earlier part of this run in it.
        overview: whether to print the network's parameters first.

    Returns:
        The contents of `result.json`.

    Raises:
        ValueError: a setting or an image is wrong, or the folder holds another run.
        FileNotFoundError: images or weights are not where the config says.
        ModuleNotFoundError: Weights & Biases is asked for, but not installed.
        FloatingPointError: the loss is no longer finite.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        # So that the run can be resumed and evaluated from any directory.
        config.model.pretrained = pretrained.absolute(config.model.pretrained)
        if config.data.root:
            config.data.root = str(Path(config.data.root).absolute())
    workdir.check(folder, config)
    writer.check(config.wandb)
    result = workdir.read_result(folder)
    if result is not None:
        return result
    if config.deterministic:
        # Read when JAX first looks for its devices.
        wanted, given = "--xla_gpu_deterministic_ops=true", os.environ.get("XLA_FLAGS", "")
        if wanted not in given:
            os.environ["XLA_FLAGS"] = f"{given} {wanted}"
    built = experiment.build(config, sharding.make_mesh())
    if overview and sharding.is_first_process():
        print(experiment.parameter_overview(built))
    if not (folder / workdir.CONFIG).exists():
        experiment.load_weights(config)  # So that bad ones are told before anything is written.
    sharding.wait_for_all("checked")
    if sharding.is_first_process():
        workdir.claim(folder, config)
    sharding.wait_for_all("claimed")
    return loop.train(built, folder)
