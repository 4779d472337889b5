"""Times a backbone of dml_jax against timm's in PyTorch: features, and features with gradients.

python -m benchmarks.backbones
python -m benchmarks.backbones --backbone=convnext_tiny --timm=convnext_tiny

Needs timm. Both take turns in one process, with random weights and images. glibc keeps freed
memory, for both.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax.cli import command_line
from dml_jax.models import BACKBONES, create_backbone

_BACKBONE = flags.DEFINE_enum("backbone", "vit_small_patch16", BACKBONES.names(), "Backbone.")
_TIMM = flags.DEFINE_string("timm", "vit_small_patch16_224", "timm's name of it.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Side of an image in pixels.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images in a batch.")
_TURNS = flags.DEFINE_integer("turns", 7, "Number of turns of each.", lower_bound=1)


def main() -> None:
    """Runs the program."""
    shape = (_BATCH.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    table = Table("", "dml_jax, ms", "timm, ms", "timm / dml_jax", "of each turn")
    for name, ours, theirs in zip(
        ("features", "and gradients"), _of_jax(images), _of_torch(images), strict=True
    ):
        times = [(_seconds(ours), _seconds(theirs)) for _ in range(1 + _TURNS.value)]
        times = times[1:]  # The first one compiles.
        middle = [1e3 * statistics.median(one) for one in zip(*times, strict=True)]
        ratios = [theirs / ours for ours, theirs in times]
        table.add_row(
            name,
            *(f"{milliseconds:.0f}" for milliseconds in middle),
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    Console().print(table)


def _of_jax(images: np.ndarray) -> list[Callable[[], Any]]:
    backbone = create_backbone(_BACKBONE.value)
    pixels = jnp.asarray(images)
    init = jax.jit(partial(backbone.init, train=False))
    variables = init(jax.random.key(0), pixels[:1])

    def features(params: Any, pixels: jax.Array) -> Any:
        return backbone.apply({**variables, "params": params}, pixels, train=False)

    def objective(params: Any, pixels: jax.Array) -> jax.Array:
        return jnp.mean(features(params, pixels) ** 2)

    functions = jax.jit(features), jax.jit(jax.grad(objective))
    return [
        partial(lambda f: jax.block_until_ready(f(variables["params"], pixels)), function)
        for function in functions
    ]


def _of_torch(images: np.ndarray) -> list[Callable[[], Any]]:
    import timm
    import torch

    network = timm.create_model(_TIMM.value, num_classes=0)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def features() -> None:
        with torch.no_grad():
            network.forward_features(pixels)

    def gradients() -> None:
        network.zero_grad()
        (network.forward_features(pixels) ** 2).mean().backward()

    return [features, gradients]


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    command_line.run(main, embeds=True)
