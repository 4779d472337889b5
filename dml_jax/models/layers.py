"""Layers that the backbones share: convolution, normalisation, pooling as PyTorch computes them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


def kaiming_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "k k c f"]:
    """N(0, 2 / fan-out), He et al., arXiv 1502.01852, equation 14."""
    # Drawn in a row: XLA takes seconds to compile each draw of a four-dimensional array.
    numbers = jax.random.normal(key, (math.prod(shape),), dtype)
    return numbers.reshape(shape) * (2 / math.prod((*shape[:2], shape[3]))) ** 0.5


def convolution(
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer = kaiming_normal,
    dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    """A square convolution, padded by half the kernel on each side.

    Args:
        features: output channels.
        kernel: side of the kernel in pixels.
        stride: of the kernel in pixels.
        use_bias: whether a bias is added.
        kernel_init: what its weights start as.
        dtype: what it computes in.
        name: of the module.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        # Explicit, since "SAME" pads a strided convolution more on the right than on the left.
        padding=kernel // 2,
        use_bias=use_bias,
        kernel_init=kernel_init,
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


def block(
    module: nn.Module, function: Callable[[Array], Array], x: Float[Array, "b h w c"]
) -> Float[Array, "b y x f"]:
    """Applies a part of a network, whose activations are not kept if `module.remat` says so.

    On the way back they are computed once more, of the part's input. Variables and their names
    are the same either way.

    Args:
        module: the network, in whose compact method this is called.
        function: the part; it may make submodules.
        x: its input.
    """
    if not module.remat:
        return function(x)
    return nn.remat(lambda _, x: function(x))(module, x)


def max_pool(
    x: Float[Array, "b h w c"],
    stride: int = 1,
    *,
    size: int = 3,
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1)),
) -> Float[Array, "b y x c"]:
    """The maximum of each square window.

    Args:
        x: feature map.
        stride: of the windows in pixels.
        size: side of a window in pixels.
        padding: pixels above and below, left and right, which are never the maximum.
    """
    outside = jnp.array(-jnp.inf, x.dtype)
    x = jax.lax.pad(x, outside, [(low, high, 0) for low, high in ((0, 0), *padding, (0, 0))])
    return _reduce_windows(x, jnp.maximum, size, stride)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of the 3x3 window around each pixel; pixels outside count as zeros."""
    return _reduce_windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), jnp.add, 3, 1) / 9


def _reduce_windows(
    x: Float[Array, "b h w c"], reduce: Callable[[Array, Array], Array], size: int, stride: int
) -> Float[Array, "b y x c"]:
    """Reduces square windows, first down and then across.

    XLA has an operation for it, but on the CPU it is several times slower, and so is the gradient
    of its maximum.
    """
    for axis in (1, 2):
        reach = (x.shape[axis] - size) // stride * stride + 1
        rows = [jax.lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(size)]
        x = functools.reduce(reduce, rows)
    return x


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
