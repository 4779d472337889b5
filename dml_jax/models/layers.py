"""Layers that the backbones share: convolution and batch normalisation as PyTorch computes them."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


def convolution(
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    padding: int | None = None,
    use_bias: bool = False,
    dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    """A square convolution.

    Args:
        features: output channels.
        kernel: side of the kernel in pixels.
        stride: of the kernel in pixels.
        padding: zeros on each side; half the kernel by default.
        use_bias: whether a bias is added.
        dtype: what it computes in.
        name: of the module.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        # Explicit, since "SAME" pads a strided convolution more on the right than on the left.
        padding=kernel // 2 if padding is None else padding,
        use_bias=use_bias,
        kernel_init=_kaiming_normal,
        dtype=dtype,
        conv_general_dilated=_convolve,
        name=name,
    )


def batch_norm(*, frozen: bool, train: bool, dtype: DTypeLike, name: str) -> nn.BatchNorm:
    """Batch normalisation; a frozen one normalises by its running statistics in training too.

    Args:
        frozen: whether the running statistics stay as they are. Scale and bias train anyway.
        train: whether the network is being trained.
        dtype: of the result; the statistics are float32 always.
        name: of the module.
    """
    return nn.BatchNorm(
        use_running_average=frozen or not train,
        momentum=0.9,
        epsilon=1e-5,
        # The fast variance, E[x^2] - E[x]^2, cancels: within 20 steps its last bits grew to
        # 1e-4 of the loss between 1 and 8 devices, against 4e-6 this way.
        use_fast_variance=False,
        dtype=dtype,
        name=name,
    )


def _convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c f"],
    strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Float[Array, "b y x f"]:
    """`lax.conv_general_dilated` with a way round a defect of XLA on the CPU.

    Where a kernel is larger than the feature map, XLA exchanges the two, and its CPU compiler has
    only a loop for what results, about 50 times slower than it ought to be. So small feature maps
    are gathered into patches, and multiplied as matrices; a gradient's map is the output's.
    """
    size = kernel.shape[0]
    (stride, _), ((low, high), _) = strides, padding
    height, width = ((n + low + high - size) // stride + 1 for n in x.shape[1:3])
    if height * width >= size**2:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = [
        x[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _kaiming_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "k k c f"]:
    """N(0, 2 / fan-out), He et al., arXiv 1502.01852, equation 14."""
    # Drawn in a row: XLA takes seconds to compile each draw of a four-dimensional array.
    numbers = jax.random.normal(key, (math.prod(shape),), dtype)
    return numbers.reshape(shape) * (2 / math.prod((*shape[:2], shape[3]))) ** 0.5
