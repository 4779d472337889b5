"""ResNet backbones with the architecture, padding and parameter names of torchvision, in NHWC.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385. As in
torchvision, the 3x3 convolution of a bottleneck has the stride.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dml_jax._utils.errors import UserError
from dml_jax.models import layers
from dml_jax.models.normalisation import IMAGENET, InputNormalisation

STEMS = ("imagenet", "small")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a 1x1-3x3-1x1 bottleneck, with a shortcut.

    Attributes:
        features: channels of the 3x3 convolutions; a bottleneck returns four times as many.
        stride: stride of the block in pixels.
        bottleneck: whether the block is a bottleneck.
        conv: constructor of a convolution from features, kernel, stride and name.
        norm: constructor of a batch normalisation from a name.
    """

    features: int
    stride: int
    bottleneck: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop: Callable[..., Array]
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the block's output, [B, H/stride, W/stride, F].

        Args:
            x: feature map.
            drop: see `layers.stochastic_depth`.
        """
        f, s = self.features, self.stride
        layers = (
            [(f, 1, 1), (f, 3, s), (4 * f, 1, 1)] if self.bottleneck else [(f, 3, s), (f, 3, 1)]
        )
        y = x
        for i, layer in enumerate(layers, start=1):
            y = y if i == 1 else nn.relu(y)
            y = self.norm(name=f"bn{i}")(self.conv(*layer, name=f"conv{i}")(y))
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], 1, s, name="downsample.0")(x)
            x = self.norm(name="downsample.1")(x)
        return nn.relu(x + drop(y))


class ResNet(nn.Module):
    """A ResNet without pooling and classifier.

    Submodules have torchvision's names, dots included, which `pretrained.convert` relies on.

    Attributes:
        stage_sizes: number of blocks in each stage.
        bottleneck: whether blocks are bottlenecks.
        width: channels of the first stage; each later stage doubles them.
        stem: "imagenet" is a 7x7 convolution and a max-pool, stride 2 each; "small" is a single
            3x3 convolution of stride 2, for images of 32 to 64 pixels.
        freeze_bn: use the running statistics in training too, without updating them; scale and bias
            still train.
        dtype: dtype of convolutions and activations. Parameters, running statistics and the
            reductions of batch normalisation are always float32.
        remat: rematerialise the activations of each block in the backward pass.
        drop_path: rate at which training drops the branch of the last block; see
            `layers.stochastic_depth`.
        input_normalisation: the normalisation of the images that the backbone expects.

    Raises:
        ValueError: the stem is unknown.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool
    width: int = 64
    stem: str = "imagenet"
    freeze_bn: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    drop_path: float = 0.0
    input_normalisation: InputNormalisation = IMAGENET

    def __post_init__(self) -> None:
        if self.stem not in STEMS:
            raise UserError(f"unknown stem {self.stem!r}: choose one of {', '.join(STEMS)}")
        super().__post_init__()

    @property
    def parts(self) -> tuple[str, ...]:
        """The consecutive parts of the network: the stem and the stages."""
        return ("stem", *(f"layer{stage}" for stage in range(1, len(self.stage_sizes) + 1)))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, parts: Sequence[str] | None = None
    ) -> Float[Array, "b y x f"]:
        """Returns the last feature map [B, h, w, F] of normalised images [B, H, W, 3].

        With `train`, uses batch statistics (unless frozen) and updates the collection
        "batch_stats", which must then be mutable.

        Args:
            x: normalised images, or the feature map that the previous part returned.
            train: whether the network is being trained.
            parts: consecutive parts to apply; all by default.
        """
        parts = self.parts if parts is None else parts
        conv = partial(layers.convolution, dtype=self.dtype)
        drops = layers.stochastic_depth(self, sum(self.stage_sizes), train=train)
        norm = partial(layers.batch_norm, frozen=self.freeze_bn, train=train, dtype=self.dtype)

        def stem(x: Float[Array, "b h w c"]) -> Float[Array, "b y x f"]:
            kernel = 7 if self.stem == "imagenet" else 3
            x = nn.relu(norm(name="bn1")(conv(self.width, kernel, 2, name="conv1")(x)))
            return layers.max_pool(x, 2) if self.stem == "imagenet" else x

        def residual(
            x: Float[Array, "b h w c"], stage: int, number: int
        ) -> Float[Array, "b y x f"]:
            return ResidualBlock(
                features=self.width * 2**stage,
                stride=2 if stage > 0 and number == 0 else 1,
                bottleneck=self.bottleneck,
                conv=conv,
                norm=norm,
                name=f"layer{stage + 1}.{number}",
            )(x, drops[sum(self.stage_sizes[:stage]) + number])

        if "stem" in parts:
            x = layers.block(self, stem, x)
        for stage, size in enumerate(self.stage_sizes):
            for number in range(size if f"layer{stage + 1}" in parts else 0):
                x = layers.block(self, partial(residual, stage=stage, number=number), x)
        return x


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, stage_sizes=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, stage_sizes=(3, 4, 23, 3), bottleneck=True),
}
