"""Weights that PyTorch trained, as variables of our backbones.

A backbone's modules are named as PyTorch's are, dots included, so that
`("params", "layer1.0", "conv1", "kernel")` is `layer1.0.conv1.weight`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dml_jax.models.registry import create_backbone

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def convert(name: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a PyTorch state dict to the variables of a backbone.

    The classifier (`fc.*`) and the counters `num_batches_tracked` are left out; every other
    tensor must find its place, and every place its tensor.

    Args:
        name: a backbone of `create_backbone`, made without options.
        state_dict: arrays by PyTorch name, convolution kernels as [out, in, height, width].

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        ValueError: on an unknown name, or listing all missing, unexpected and misshapen tensors.
    """
    init = partial(create_backbone(name).init, train=False)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    template = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), image))
    paths = {".".join((*path[1:-1], _LEAVES[path[-1]])): path for path in template}
    arrays = {
        key: np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array
        for key, array in state_dict.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    problems = [f"{key} is missing" for key in paths.keys() - arrays.keys()]
    problems += [f"{key} is unexpected" for key in arrays.keys() - paths.keys()]
    for key in paths.keys() & arrays.keys():
        expected, shape = template[paths[key]].shape, arrays[key].shape
        if shape != expected:
            problems.append(f"{key} is {_torch(shape)}, but should be {_torch(expected)}")
    if problems:
        raise ValueError(f"these are no weights of {name}: {'; '.join(sorted(problems))}")
    return flax.traverse_util.unflatten_dict(
        {path: jnp.array(arrays[key], jnp.float32) for key, path in paths.items()}
    )


def _torch(shape: tuple[int, ...]) -> list[int]:
    """A shape of ours as PyTorch lays it out: kernels [out, in, height, width], the rest alike."""
    return [shape[axis] for axis in (3, 2, 0, 1)] if len(shape) == 4 else list(shape)
