"""Networks by name. A new backbone is a file beside this one and a line in `BACKBONES`."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dml_jax.models import bninception, convnet, resnet
from dml_jax.models.embedder import Embedder

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **resnet.VARIANTS,
    "bninception": bninception.BNInception,
    "conv4": convnet.ConvNet,
}


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Makes a bare network, called as `apply(variables, images, train=False)`.

    Args:
        name: a key of `BACKBONES`.
        **options: attributes of the backbone's module, such as `width`, `stem`, `freeze_bn` and
            `dtype` of `resnet.ResNet`.

    Returns:
        A module from normalised images [B, H, W, 3] to a feature map [B, h, w, F].

    Raises:
        ValueError: on an unknown name.
        TypeError: on an option that the backbone does not have.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name](**options)


def backbone_options(name: str) -> dict[str, Any]:
    """The options of a backbone in `BACKBONES`, with their defaults."""
    parameters = inspect.signature(BACKBONES[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items()}


def check_image_size(name: str, size: int) -> None:
    """Makes sure that a backbone in `BACKBONES` takes square images of so many pixels a side.

    Raises:
        ValueError: they are too small for it, or halve badly.
    """
    # A backbone that takes any size says nothing of it.
    check = getattr(BACKBONES[name], "check_image_size", None)
    if check is not None:
        check(size, size)


def create_embedder(
    *,
    backbone: str,
    pooling: str,
    dim: int,
    head_init: str = "uniform",
    channels: str | None = None,
    **options: Any,
) -> Embedder:
    """Makes an embedder.

    Args:
        backbone: a key of `BACKBONES`.
        pooling: "gap", "gmp" or "gap+gmp".
        dim: size of an embedding.
        head_init: "uniform" or "kaiming_fan_out"; see `Embedder`.
        channels: "rgb" or "bgr", the order in which the backbone gets its channels; by default
            that of its pretrained weights. Its means and deviations stay in their order: the first
            is that of the first channel, whichever it is.
        **options: see `create_backbone`; one that is None is as if it were not given.

    Returns:
        A module from RGB images of 0..255 [B, H, W, 3] to raw float32 embeddings [B, dim].

    Raises:
        ValueError: on an unknown backbone, pooling or head_init.
        TypeError: on an option that the backbone does not have.
    """
    given = {option: value for option, value in options.items() if value is not None}
    module = create_backbone(backbone, **given)
    if channels is not None:
        normalisation = module.input_normalisation._replace(channels=channels)
        module = module.clone(input_normalisation=normalisation)
    return Embedder(backbone=module, pooling=pooling, dim=dim, head_init=head_init)
