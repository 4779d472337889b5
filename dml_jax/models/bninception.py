"""BN-Inception with the architecture, padding and parameter names of its PyTorch port, in NHWC.

Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, arXiv 1502.03167, figure 5, in the
variant of the Caffe model and its port: each convolution has a bias and a batch normalisation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dml_jax._utils.errors import UserError
from dml_jax.models import layers
from dml_jax.models.normalisation import CAFFE, InputNormalisation


class Inception(NamedTuple):
    """Output channels of a block's convolutions, in the order of its concatenated branches.

    A block that halves the feature map has no 1x1 branch and no projection: both are 0.
    """

    single: int
    """1x1."""
    triple: tuple[int, int]
    """1x1, then 3x3."""
    double: tuple[int, int]
    """1x1, then 3x3 twice."""
    projection: int
    """1x1 after `pool`."""
    pool: Callable[[Array], Array] = layers.average_pool

    @property
    def halves(self) -> bool:
        """Whether the block halves the resolution of the feature map."""
        return not self.projection


BLOCKS = {
    "3a": Inception(64, (64, 64), (64, 96), 32),
    "3b": Inception(64, (64, 96), (64, 96), 64),
    "3c": Inception(0, (128, 160), (64, 96), 0),
    "4a": Inception(224, (64, 96), (96, 128), 128),
    "4b": Inception(192, (96, 128), (96, 128), 128),
    "4c": Inception(160, (128, 160), (128, 160), 128),
    "4d": Inception(96, (128, 192), (160, 192), 128),
    "4e": Inception(0, (128, 192), (192, 256), 0),
    "5a": Inception(352, (192, 320), (160, 224), 128),
    "5b": Inception(352, (192, 320), (192, 224), 128, layers.max_pool),
}


class BNInception(nn.Module):
    """BN-Inception without pooling and classifier.

    Submodules have the names of the PyTorch port, which `pretrained.convert` relies on.

    Attributes:
        freeze_bn: use the running statistics in training too, without updating them; scale and bias
            still train.
        dtype: dtype of convolutions and activations. Parameters, running statistics and the
            reductions of batch normalisation are always float32.
        remat: rematerialise the activations of each block in the backward pass.
        input_normalisation: the normalisation of the images that the backbone expects.
    """

    freeze_bn: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    input_normalisation: InputNormalisation = CAFFE

    @staticmethod
    def check_image_size(height: int, width: int) -> None:
        """Raises a ValueError for an image size that a block cannot halve."""
        # The first three halving layers reduce a side to (side + 1) // 8 pixels.
        if any(not side // 8 or side // 8 % 4 for side in (height + 1, width + 1)):
            raise UserError(
                f"bninception cannot halve images of {height}x{width} pixels five times; "
                "choose multiples of 32"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The consecutive parts of the network: the stem and the blocks."""
        return ("stem", *(f"inception_{name}" for name in BLOCKS))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, parts: Sequence[str] | None = None
    ) -> Float[Array, "b y x f"]:
        """Returns the last feature map [B, H/32, W/32, 1024] of normalised images [B, H, W, 3].

        With `train`, uses batch statistics (unless frozen) and updates the collection
        "batch_stats", which must then be mutable.

        Args:
            x: normalised images, or the feature map that the previous part returned.
            train: whether the network is being trained.
            parts: consecutive parts to apply; all by default.

        Raises:
            ValueError: a block cannot halve its feature map. Multiples of 32 are always valid.
        """
        parts = self.parts if parts is None else parts
        conv = partial(layers.convolution, use_bias=True, dtype=self.dtype)
        norm = partial(layers.batch_norm, frozen=self.freeze_bn, train=train, dtype=self.dtype)

        def unit(
            x: Float[Array, "b h w c"], features: int, kernel: int, name: str, stride: int = 1
        ) -> Float[Array, "b y x f"]:
            return nn.relu(norm(name=f"{name}_bn")(conv(features, kernel, stride, name=name)(x)))

        def stem(x: Float[Array, "b h w c"]) -> Float[Array, "b y x f"]:
            x = _halve(unit(x, 64, 7, "conv1_7x7_s2", stride=2))
            x = unit(x, 64, 1, "conv2_3x3_reduce")
            return _halve(unit(x, 192, 3, "conv2_3x3"))

        if "stem" in parts:
            self.check_image_size(*x.shape[1:3])
            x = layers.block(self, stem, x)
        for name, block in BLOCKS.items():
            if f"inception_{name}" in parts:
                inception = partial(_inception, block=block, name=f"inception_{name}", unit=unit)
                x = layers.block(self, inception, x)
        return x


def _inception(
    x: Float[Array, "b h w c"], block: Inception, name: str, unit: Callable[..., Array]
) -> Float[Array, "b y x f"]:
    stride = 2 if block.halves else 1
    triple = unit(x, block.triple[0], 1, f"{name}_3x3_reduce")
    triple = unit(triple, block.triple[1], 3, f"{name}_3x3", stride)
    double = unit(x, block.double[0], 1, f"{name}_double_3x3_reduce")
    double = unit(double, block.double[1], 3, f"{name}_double_3x3_1")
    double = unit(double, block.double[1], 3, f"{name}_double_3x3_2", stride)
    if block.halves:
        branches = [triple, double, _halve(x)]
    else:
        single = unit(x, block.single, 1, f"{name}_1x1")
        projection = unit(block.pool(x), block.projection, 1, f"{name}_pool_proj")
        branches = [single, triple, double, projection]
    return jnp.concatenate(branches, axis=-1)


def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b y x c"]:
    """Returns a 3x3 max-pool of stride 2, padded at the end to cover the last pixels."""
    down, across = ((0, 1 - side % 2) for side in x.shape[1:3])
    return layers.max_pool(x, 2, padding=(down, across))
