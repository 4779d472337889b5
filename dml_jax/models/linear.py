"""Convolutions and linear layers whose parameters have float32 gradients in every dtype.

Flax's layers round a kernel to bfloat16, and its gradient is rounded to bfloat16 before devices sum
it. These layers multiply by the same rounded kernel, but the gradient of a parameter is a float32
sum, on a device and over devices.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

_NHWC = ("NHWC", "HWIO", "NHWC")

# The dimensions of the operands and the result that make a convolution the gradient of a kernel:
# channels are the batch, and the batch is summed.
_OF_KERNEL = jax.lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Pixels (above, below), (left, right)."""


class Conv(nn.Module):
    """A convolution with a square kernel, with the parameters of `nn.Conv`.

    Attributes:
        features: output channels.
        kernel: side of the kernel in pixels.
        stride: stride in pixels.
        padding: pixels added on each side.
        use_bias: whether to add a bias.
        kernel_init: initialiser of the kernel.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b y x f"]:
        """Returns the feature map, of dtype `dtype`."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        pixels = (self.padding, self.padding)
        y = _unfold_or_convolve(x.astype(self.dtype), kernel, self.stride, (pixels, pixels))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return _add(y, bias)


class Dense(nn.Module):
    """A linear layer, with the parameters of `nn.Dense`.

    Attributes:
        features: output features.
        use_bias: whether to add a bias.
        kernel_init: initialiser of the kernel.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows f"]:
        """Returns the features, of dtype `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = _multiply(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return _add(y, bias)


def _unfold_or_convolve(
    x: Float[Array, "b h w c"], kernel: Float32[Array, "k k c f"], stride: int, padding: Padding
) -> Float[Array, "b y x f"]:
    """Returns the convolution, as a product of matrices where that is better.

    Windows that do not overlap are the rows of a matrix already. If the kernel is larger than the
    feature map, XLA exchanges the two, and its CPU compiler emits a loop about 50 times slower than
    expected. So small feature maps are unfolded into patches. The size of the output decides, since
    it is the map of the gradient.
    """
    size, channels = len(kernel), x.shape[-1]
    (low, high), _ = padding
    height, width = ((n + low + high - size) // stride + 1 for n in x.shape[1:3])
    if size == stride and not low + high:
        x = x[:, : height * size, : width * size]
        windows = x.reshape(-1, height, size, width, size, channels).swapaxes(2, 3)
        windows = windows.reshape(-1, height, width, size * size * channels)
        return _multiply(windows, kernel.reshape(-1, kernel.shape[-1]))
    if height * width >= size**2:
        return _convolve(x, kernel, stride, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = [
        x[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(size)
        for j in range(size)
    ]
    return _multiply(jnp.concatenate(patches, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


def _plain(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    strides = (stride, stride)
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(
    x: Float[Array, "b h w c"], kernel: Float32[Array, "k k c f"], stride: int, padding: Padding
) -> Float[Array, "b y x f"]:
    return _plain(x, kernel, stride, padding)


def _convolve_forward(
    x: Array, kernel: Array, stride: int, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
    stride: int, padding: Padding, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    of_x = jax.linear_transpose(lambda x: _plain(x, kernel, stride, padding), x)
    return *of_x(gradient), _kernel_gradient(x, gradient, len(kernel), stride, padding)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(
    x: Float[Array, "b h w c"],
    gradient: Float[Array, "b y x f"],
    size: int,
    stride: int,
    padding: Padding,
) -> Float32[Array, "k k c f"]:
    """Returns the gradient of a kernel: the correlation of the input with the output's gradient."""
    # The output's gradient is the kernel here, with gaps of the stride.
    spans = [(n - 1) * stride + 1 for n in gradient.shape[1:3]]
    sides = zip(x.shape[1:3], spans, padding, strict=True)
    return jax.lax.conv_general_dilated(
        x,
        gradient,
        (1, 1),
        [(low, size - 1 + span - n - low) for n, span, (low, _) in sides],
        rhs_dilation=(stride, stride),
        dimension_numbers=_OF_KERNEL,
        preferred_element_type=jnp.float32,
    )


@jax.custom_vjp
def _multiply(x: Float[Array, "*rows c"], kernel: Float32[Array, "c f"]) -> Float[Array, "*rows f"]:
    return x @ kernel.astype(x.dtype)


def _multiply_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(x, kernel), (x, kernel)


def _multiply_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    of_kernel = jnp.einsum("...c,...f->cf", x, gradient, preferred_element_type=jnp.float32)
    return gradient @ kernel.astype(x.dtype).T, of_kernel


_multiply.defvjp(_multiply_forward, _multiply_backward)


@jax.custom_vjp
def _add(x: Float[Array, "*rows f"], bias: Float32[Array, " f"]) -> Float[Array, "*rows f"]:
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return _add(x, bias), None


def _add_backward(saved: None, gradient: Array) -> tuple[Array, Array]:
    del saved
    rows = tuple(range(gradient.ndim - 1))
    return gradient, jnp.sum(gradient, rows, dtype=jnp.float32)


_add.defvjp(_add_forward, _add_backward)
