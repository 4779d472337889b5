"""Input normalisation of the backbones."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

_HALF = (127.5, 127.5, 127.5)

Channels = Literal["rgb", "bgr"]
CHANNELS = get_args(Channels)


class InputNormalisation(NamedTuple):
    """Per-channel affine map from pixels to a backbone's input.

    Attributes:
        mean: mean of each channel, in units of 0..255, in the order of `channels`.
        std: standard deviation of each channel, in units of 0..255, in the order of `channels`.
        channels: order of the backbone's input channels.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: Channels

    def normalise(self, images: Num[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Returns the backbone's float32 input for RGB images in 0..255."""
        if self.channels == "bgr":
            images = images[..., ::-1]
        mean, std = (jnp.array(x, jnp.float32).reshape(1, 1, 1, 3) for x in (self.mean, self.std))
        return (images.astype(jnp.float32) - mean) / std


IMAGENET = InputNormalisation(
    mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), channels="rgb"
)
"""Input of torchvision's pretrained networks."""

INCEPTION = InputNormalisation(mean=_HALF, std=_HALF, channels="rgb")
"""Input of AugReg's and SigLIP's vision transformers: pixels from -1 to 1."""

CLIP = InputNormalisation(
    mean=(122.7709383, 116.7460125, 104.09373615),
    std=(68.5005327, 66.6321579, 70.32316305),
    channels="rgb",
)
"""Input of OpenAI's CLIP."""

CAFFE = InputNormalisation(mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), channels="bgr")
"""Input of networks pretrained with Caffe."""

NORMALISATIONS = {"imagenet": IMAGENET, "inception": INCEPTION, "clip": CLIP, "caffe": CAFFE}
"""By name."""
