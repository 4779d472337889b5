"""Networks by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dml_jax._utils.registry import Registry
from dml_jax.models import bninception, convnet, convnext, resnet, vit
from dml_jax.models.embedder import ALL, Embedder
from dml_jax.models.normalisation import NORMALISATIONS

BACKBONES: Registry[Callable[..., nn.Module]] = Registry("backbone", nn.Module)
"""Modules by name. `register_backbone` adds one, also from outside the package."""

register_backbone = BACKBONES.register

for _name, _module in (resnet.VARIANTS | convnext.VARIANTS | vit.VARIANTS).items():
    register_backbone(_name)(_module)
register_backbone("bninception")(bninception.BNInception)
register_backbone("conv4")(convnet.ConvNet)


def create_backbone(name: str, **options: Any) -> nn.Module:
    """Returns a backbone, called as `apply(variables, images, train=False)`.

    Args:
        name: a name in `BACKBONES`, or the import path of a backbone.
        **options: attributes of the backbone's module, such as `width`, `stem`, `freeze_bn` and
            `dtype` of `resnet.ResNet`.

    Returns:
        A module from normalised images [B, H, W, 3] to a feature map [B, h, w, F].

    Raises:
        ValueError: the name is unknown.
        TypeError: the backbone does not have an option.
    """
    return BACKBONES.get(name)(**options)


def check_image_size(name: str, size: int) -> None:
    """Checks that a backbone in `BACKBONES` accepts square images of `size` pixels a side.

    Raises:
        ValueError: the size is too small, or not divisible as the backbone requires.
    """
    # A backbone that accepts any size has no such method.
    check = getattr(BACKBONES.get(name), "check_image_size", None)
    if check is not None:
        check(size, size)


def create_embedder(
    *,
    backbone: str,
    pooling: str,
    dim: int,
    head_init: str = "uniform",
    train_from: str = ALL,
    channels: str | None = None,
    normalisation: str | None = None,
    **options: Any,
) -> Embedder:
    """Returns an embedder.

    Args:
        backbone: a name in `BACKBONES`, or the import path of a backbone.
        pooling: "gap", "gmp", "gap+gmp", "gem" or "token"; see `Embedder`.
        dim: size of an embedding.
        head_init: "uniform" or "kaiming_fan_out"; see `Embedder`.
        train_from: "all", a part of the backbone, or "head"; see `Embedder`.
        channels: "rgb" or "bgr", the order of the backbone's input channels; by default that of its
            pretrained weights. The order of its means and standard deviations does not change: the
            first ones apply to the first channel, red or blue.
        normalisation: a key of `NORMALISATIONS`; by default that of the backbone.
        **options: see `create_backbone`; an option of None is ignored.

    Returns:
        A module from RGB images in 0..255 [B, H, W, 3] to raw float32 embeddings [B, dim].

    Raises:
        ValueError: the backbone, pooling, head_init or train_from is unknown.
        TypeError: the backbone does not have an option.
    """
    given = {option: value for option, value in options.items() if value is not None}
    module = create_backbone(backbone, **given)
    of_input = module.input_normalisation
    if normalisation is not None:
        of_input = NORMALISATIONS[normalisation]
    if channels is not None:
        of_input = of_input._replace(channels=channels)
    if of_input != module.input_normalisation:
        module = module.clone(input_normalisation=of_input)
    return Embedder(
        backbone=module, pooling=pooling, dim=dim, head_init=head_init, train_from=train_from
    )
