"""A convolutional network of four blocks for small images, "Conv-4" in few-shot learning.

Source: Vinyals et al., Matching networks for one shot learning, NeurIPS 2016, section 4.1.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dml_jax._utils.errors import UserError
from dml_jax.models import layers
from dml_jax.models.normalisation import IMAGENET, InputNormalisation


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling.

    Attributes:
        width: channels of each block.
        freeze_bn: use the running statistics in training too, without updating them; scale and bias
            still train.
        dtype: dtype of convolutions and activations.
        input_normalisation: the normalisation of the images that the backbone expects.
    """

    width: int = 64
    freeze_bn: bool = False
    dtype: DTypeLike = jnp.float32
    input_normalisation: InputNormalisation = IMAGENET

    @staticmethod
    def check_image_size(height: int, width: int) -> None:
        """Raises a ValueError for images of fewer than 16 pixels a side."""
        if min(height, width) < 16:
            raise UserError(
                f"conv4 cannot halve images of {height}x{width} pixels four times; choose 16 or "
                "more"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The consecutive parts of the network: the blocks."""
        return ("block1", "block2", "block3", "block4")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, parts: Sequence[str] | None = None
    ) -> Float[Array, "b y x f"]:
        """Returns the feature map [B, H/16, W/16, width] of normalised images [B, H, W, 3].

        With `train`, the collection "batch_stats" must be mutable, as in `resnet.ResNet`.

        Args:
            x: normalised images, or the feature map that the previous part returned.
            train: whether the network is being trained.
            parts: consecutive parts to apply; all by default.

        Raises:
            ValueError: images have fewer than 16 pixels a side.
        """
        parts = self.parts if parts is None else parts
        if "block1" in parts:
            self.check_image_size(*x.shape[1:3])
        for block in range(1, 5):
            if f"block{block}" not in parts:
                continue
            x = layers.convolution(
                self.width, 3, kernel_init=_pytorch_uniform, dtype=self.dtype, name=f"conv{block}"
            )(x)
            x = layers.batch_norm(
                frozen=self.freeze_bn, train=train, dtype=self.dtype, name=f"bn{block}"
            )(x)
            x = layers.max_pool(nn.relu(x), 2, size=2, padding=((0, 0), (0, 0)))
        return x


def _pytorch_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "k k c f"]:
    """Returns a sample of U(-1/sqrt(fan-in), 1/sqrt(fan-in)), PyTorch's default of a convolution.

    Batch normalisation removes the scale of the weights, but larger weights make the same steps
    relatively smaller. With `layers.kaiming_normal`, 2.4 times as large, the network learns more
    slowly and generalises worse.
    """
    bound = math.prod(shape[:3]) ** -0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)
