"""A plain convolutional network of four blocks for small images, few-shot learning's "Conv-4".

Vinyals et al., Matching networks for one shot learning, NeurIPS 2016, section 4.1.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dml_jax.models import layers
from dml_jax.models.normalisation import IMAGENET, InputNormalisation


class ConvNet(nn.Module):
    """Four times a 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling.

    Attributes:
        width: channels of every block.
        freeze_bn: normalise by the running statistics in training too and leave them as they are;
            scale and bias still train.
        dtype: what convolutions and activations compute in.
        input_normalisation: what images become before they reach the backbone.
    """

    width: int = 64
    freeze_bn: bool = False
    dtype: DTypeLike = jnp.float32
    input_normalisation: InputNormalisation = IMAGENET

    @staticmethod
    def check_image_size(height: int, width: int) -> None:
        """Raises a ValueError for images of which nothing would be left."""
        if min(height, width) < 16:
            raise ValueError(
                f"conv4 cannot halve images of {height}x{width} pixels four times; choose 16 or "
                "more"
            )

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b y x f"]:
        """Maps normalised images [B, H, W, 3] to a feature map [B, H/16, W/16, width] in `dtype`.

        With `train`, the collection "batch_stats" must be mutable, as in `resnet.ResNet`.

        Raises:
            ValueError: images of fewer than 16 pixels a side.
        """
        self.check_image_size(*images.shape[1:3])
        x = images
        for block in range(1, 5):
            x = layers.convolution(
                self.width, 3, kernel_init=_small_uniform, dtype=self.dtype, name=f"conv{block}"
            )(x)
            x = layers.batch_norm(
                frozen=self.freeze_bn, train=train, dtype=self.dtype, name=f"bn{block}"
            )(x)
            x = layers.max_pool(nn.relu(x), 2, size=2, padding=((0, 0), (0, 0)))
        return x


def _small_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "k k c f"]:
    """U(-1/sqrt(fan-in), 1/sqrt(fan-in)), as PyTorch starts a convolution.

    Batch normalisation takes the size of the weights out again, but beside larger ones the same
    steps are smaller: from `layers.kaiming_normal`, 2.4 times as large, the network learns more
    slowly and generalises worse.
    """
    bound = math.prod(shape[:3]) ** -0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)
