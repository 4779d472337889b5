"""The input of training: batches on their devices, one transfer ahead of the step."""

from collections.abc import Generator, Iterator
from typing import Any

import jax
from jaxtyping import Array

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.training.builder import Experiment


def device_batches(
    experiment: Experiment, start: int, total_steps: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields batches on their devices, each with the number of steps done after it.

    A batch holds labels, and either images or what the step crops images from.

    Args:
        experiment: whose images.
        start: steps that are done.
        total_steps: steps of the whole run.
    """
    reader, on_devices = _reader(experiment, start, total_steps)
    try:
        sent = None
        for step, batch in enumerate(reader, start):
            ahead = sharding.put_batch(experiment.mesh, batch | on_devices)
            if sent is not None:
                yield step, sent
            sent = ahead
        if sent is not None:
            yield total_steps, sent
    finally:
        reader.close()


def _reader(
    experiment: Experiment, start: int, total_steps: int
) -> tuple[data.Batches | Generator[dict[str, Any]], dict[str, Array]]:
    """Returns this process's rows of each batch, and the arrays on the devices that all share."""
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
