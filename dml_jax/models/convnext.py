"""ConvNeXt with the architecture and the parameter names of timm, in NHWC.

Source: Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dml_jax._utils.errors import UserError
from dml_jax.models import depthwise, layers, linear, vit
from dml_jax.models.normalisation import IMAGENET, InputNormalisation


class Block(nn.Module):
    """A 7x7 depthwise convolution, a normalisation and a perceptron, added to the input.

    Attributes:
        dtype: dtype of the computation.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop: Callable[..., Array]
    ) -> Float[Array, "b h w c"]:
        """Returns the feature map after the block; see `layers.stochastic_depth` for `drop`."""
        channels = x.shape[-1]
        dense = partial(linear.Dense, dtype=self.dtype, kernel_init=layers.truncated_normal)
        y = depthwise.convolution(channels, 7, dtype=self.dtype, name="conv_dw")(x)
        y = vit.Mlp(dense, vit.gelu, name="mlp")(_normalisation(self.dtype, "norm")(y))
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
        return x + drop(y * gamma.astype(y.dtype).reshape(1, 1, 1, -1))


class ConvNeXt(nn.Module):
    """A ConvNeXt without pooling and classifier.

    Submodules have timm's names, dots included, which `pretrained.convert` relies on.

    Attributes:
        stage_sizes: number of blocks in each stage.
        width: channels of the first stage; each later stage doubles them.
        dtype: dtype of the computation. Parameters and statistics of normalisations are float32.
        remat: rematerialise the activations of each block in the backward pass.
        drop_path: rate at which training drops the branch of the last block; see
            `layers.stochastic_depth`.
        input_normalisation: the normalisation of the images that the backbone expects.
    """

    stage_sizes: tuple[int, ...]
    width: int = 96
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    drop_path: float = 0.0
    input_normalisation: InputNormalisation = IMAGENET

    @staticmethod
    def check_image_size(height: int, width: int) -> None:
        """Raises a ValueError for images of fewer than 32 pixels a side."""
        if min(height, width) < 32:
            raise UserError(
                f"ConvNeXt cannot reduce images of {height}x{width} pixels by 32; choose 32 or more"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The consecutive parts of the network: the stem and the stages."""
        return ("stem", *(f"stages.{stage}" for stage in range(len(self.stage_sizes))))

    def setup(self) -> None:
        """Makes the normalisation of pooled features, which belongs to the last stage."""
        self._head_norm = _normalisation(jnp.float32, "head.norm")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, parts: Sequence[str] | None = None
    ) -> Float[Array, "b y x f"]:
        """Returns the last feature map [B, H/32, W/32, F] of normalised images [B, H, W, 3].

        Args:
            x: normalised images, or the feature map that the previous part returned.
            train: whether the network is being trained: it then drops branches.
            parts: consecutive parts to apply; all by default.

        Raises:
            ValueError: images have fewer than 32 pixels a side.
        """
        parts = self.parts if parts is None else parts
        if "stem" in parts:
            self.check_image_size(*x.shape[1:3])
            x = self._reduce(self.width, 4, "stem.0")(x)
            x = _normalisation(self.dtype, "stem.1")(x)

        drops = layers.stochastic_depth(self, sum(self.stage_sizes), train=train)

        def transform(
            x: Float[Array, "b h w c"], name: str, drop: Callable[..., Array]
        ) -> Float[Array, "b h w c"]:
            return Block(self.dtype, name=name)(x, drop)

        for stage, size in enumerate(self.stage_sizes):
            if f"stages.{stage}" not in parts:
                continue
            if stage > 0:
                x = _normalisation(self.dtype, f"stages.{stage}.downsample.0")(x)
                x = self._reduce(self.width * 2**stage, 2, f"stages.{stage}.downsample.1")(x)
            for number in range(size):
                name = f"stages.{stage}.blocks.{number}"
                drop = drops[sum(self.stage_sizes[:stage]) + number]
                x = layers.block(self, partial(transform, name=name, drop=drop), x)
        if self.is_initializing() and self.parts[-1] in parts:
            self.normalise_pooled(x.mean((1, 2)))
        return x

    def normalise_pooled(self, x: Float[Array, "b f"]) -> Float[Array, "b f"]:
        """Returns the normalised pooled features, from which timm's classifier starts."""
        return self._head_norm(x)

    def _reduce(self, features: int, factor: int, name: str) -> linear.Conv:
        """Returns a convolution whose windows do not overlap."""
        return linear.Conv(
            features,
            factor,
            factor,
            kernel_init=layers.truncated_normal,
            dtype=self.dtype,
            name=name,
        )


def _normalisation(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "convnext_tiny": partial(ConvNeXt, stage_sizes=(3, 3, 9, 3)),
    "convnext_small": partial(ConvNeXt, stage_sizes=(3, 3, 27, 3)),
    "convnext_base": partial(ConvNeXt, stage_sizes=(3, 3, 27, 3), width=128),
}
