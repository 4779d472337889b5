"""Networks by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dml_jax._utils.registry import Registry
from dml_jax.models import bninception, convnet, resnet
from dml_jax.models.embedder import Embedder

BACKBONES: Registry[Callable[..., nn.Module]] = Registry("backbone")
"""Modules by name. `register_backbone` adds one, also from outside the package."""

register_backbone = BACKBONES.register

for _name, _module in resnet.VARIANTS.items():
    register_backbone(_name)(_module)
register_backbone("bninception")(bninception.BNInception)
register_backbone("conv4")(convnet.ConvNet)


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Makes a bare network, called as `apply(variables, images, train=False)`.

    Args:
        name: a name in `BACKBONES`, or the import path of a backbone.
        **options: attributes of the backbone's module, such as `width`, `stem`, `freeze_bn` and
            `dtype` of `resnet.ResNet`.

    Returns:
        A module from normalised images [B, H, W, 3] to a feature map [B, h, w, F].

    Raises:
        ValueError: on an unknown name.
        TypeError: on an option that the backbone does not have.
    """
    return BACKBONES.get(name)(**options)


def check_image_size(name: str, size: int) -> None:
    """Makes sure that a backbone in `BACKBONES` takes square images of so many pixels a side.

    Raises:
        ValueError: they are too small for it, or halve badly.
    """
    # A backbone that takes any size says nothing of it.
    check = getattr(BACKBONES.get(name), "check_image_size", None)
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
        backbone: a name in `BACKBONES`, or the import path of a backbone.
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
