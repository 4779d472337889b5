"""Times the convolutions of conv4 and their gradients in XLA and in PyTorch.

python -m benchmarks.convolutions

These account for the difference between small networks in JAX and in PyTorch on a CPU. Both take
turns in one process. glibc keeps freed memory, for both.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax.cli import command_line
from dml_jax.models import layers

_WIDTH = flags.DEFINE_integer("width", 48, "Channels of every block.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 32, "Side of the input in pixels; each block halves it."
)
_BATCH = flags.DEFINE_integer("batch", 128, "Images in a batch.")
_TURNS = flags.DEFINE_integer("turns", 5, "Number of turns of each.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 10, "Calls in a turn.", lower_bound=1)

PARTS = ("forward", "kernel gradient", "input gradient")


def main() -> None:
    """Runs the program."""
    table = Table("convolution", *(f"{part}, ms: XLA, PyTorch" for part in PARTS))
    for block, channels in enumerate((3, *[_WIDTH.value] * 3)):
        size = _IMAGE_SIZE.value >> block
        rng = np.random.default_rng(block)
        image, kernel, result = (
            rng.standard_normal(shape, np.float32)
            for shape in (
                (_BATCH.value, size, size, channels),
                (3, 3, channels, _WIDTH.value),
                (_BATCH.value, size, size, _WIDTH.value),
            )
        )
        pairs = zip(_of_xla(image, kernel, result), _of_torch(image, kernel, result), strict=True)
        # Training does not need the gradient with respect to the pixels.
        times = [_medians(pair) for pair in itertools.islice(pairs, 3 if block else 2)]
        cells = [" ".join(f"{milliseconds:.1f}" for milliseconds in pair) for pair in times]
        table.add_row(f"{size}x{size}, {channels} to {_WIDTH.value}", *cells)
    Console().print(table)


def _of_xla(image: Any, kernel: Any, result: Any) -> list[Callable[[], Any]]:
    layer = layers.convolution(kernel.shape[-1], 3, dtype="float32", name="conv")

    def convolve(image: jax.Array, kernel: jax.Array) -> Any:
        return layer.apply({"params": {"kernel": kernel}}, image)

    def gradient(by: int, image: jax.Array, kernel: jax.Array, result: jax.Array) -> jax.Array:
        return jax.vjp(convolve, image, kernel)[1](result)[by]

    image, kernel, result = map(jax.device_put, (image, kernel, result))
    calls = [partial(jax.jit(convolve), image, kernel)]
    calls += [partial(jax.jit(partial(gradient, by)), image, kernel, result) for by in (1, 0)]
    return [partial(_wait_for, call) for call in calls]


def _wait_for(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def _of_torch(image: Any, kernel: Any, result: Any) -> list[Callable[[], Any]]:
    import torch

    image, result = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (image, result))
    kernel = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last)

    def gradient(image_too: bool) -> Any:
        wanted = [image_too, not image_too, False]
        return torch.ops.aten.convolution_backward(
            result, image, kernel, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
        )

    forward = partial(torch.nn.functional.conv2d, image, kernel, padding=1)
    return [forward, partial(gradient, False), partial(gradient, True)]


def _medians(calls: tuple[Callable[[], Any], ...]) -> list[float]:
    """Returns the median milliseconds of each call; the calls take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call, times in [*zip(calls, seconds, strict=True)] * _TURNS.value:
        call()  # Compiles, or waits until the threads of the other are idle.
        for _ in range(_CALLS.value):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return [1e3 * statistics.median(times) for times in seconds]


if __name__ == "__main__":
    command_line.run(main, embeds=True)
