"""The input of training: batches on the devices, transferred one step ahead."""

from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.training.builder import Experiment

_VIEWS = 1  # Distinguishes the random numbers of views from those of the order of an epoch.


def device_batches(
    experiment: Experiment, start: int, total_steps: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields the number of steps done after each batch, and the batch on the devices.

    A batch holds labels, and images, cached features, or the device cache with indices into it.

    Args:
        experiment: the experiment that provides images and settings.
        start: number of steps already done.
        total_steps: number of steps of the whole run.
    """
    reader, shared = _reader(experiment, start, total_steps)
    try:
        current = None
        for step, batch in enumerate(reader, start):
            following = sharding.put_batch(experiment.mesh, batch | shared)
            if current is not None:
                yield step, current
            current = following
        if current is not None:
            yield total_steps, current
    finally:
        reader.close()


def _reader(
    experiment: Experiment, start: int, total_steps: int
) -> tuple[data.Batches | Generator[dict[str, Any]], dict[str, Array]]:
    """Returns this process's rows of each batch, and arrays on the devices common to all."""
    config, source = experiment.config, experiment.sources["train"]
    cache = experiment.cache("train")
    order = {
        "batch_size": config.batch_size,
        "n_instance": config.data.n_instance,
        "seed": config.seed,
        "start_step": start,
        "num_steps": total_steps,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if config.data.cache == "features":
        return _feature_batches(experiment, start, data.train_indices(source, **order)), {}
    if cache is not None:
        indices = data.train_indices(source, **order)
        rows = (batch | {"sides": cache.sides[batch["index"]]} for batch in indices)
        return rows, {"cache": cache.images}
    reader = data.train_batches(
        source,
        image_size=config.data.image_size,
        augmentation=config.data.augmentation,
        num_workers=config.data.num_workers,
        **order,
    )
    return reader, {}


def _feature_batches(
    experiment: Experiment, start: int, indices: Iterator[data.IndexBatch]
) -> Generator[dict[str, Any]]:
    """Yields batches with a random view of each image; the views depend on seed and step alone."""
    features, config = experiment.features["train"], experiment.config
    for step, batch in enumerate(indices, start):
        count = len(batch["index"])
        rng = np.random.default_rng([config.seed, step, _VIEWS])
        drawn = rng.integers(features.views, size=config.batch_size)
        views = drawn[jax.process_index() * count :][:count]
        yield {"features": features.take(batch["index"], views), "label": batch["label"]}
