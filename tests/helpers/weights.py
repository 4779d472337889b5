"""The weights of the golden backbone features, generated from the names of the tensors."""

import json
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "backbone_state_dicts.json").read_text())


def state_dict(name):
    """Returns all tensors of a backbone by PyTorch name."""
    return {key: _tensor(key, shape) for key, shape in SHAPES[name].items()}


def port(name):
    """Returns the state dict in the form of old ports: a parallel model's, before PyTorch 0.2."""
    tensors = state_dict(name)
    old = {k: x[None] if x.ndim == 1 and "bn" in k else x for k, x in tensors.items()}
    size = {"bninception": 1024, "resnet18": 512}[name]
    old |= {"last_linear.weight": np.ones((1000, size), np.float32)}
    old |= {"last_linear.bias": np.ones(1000, np.float32)}
    return {f"module.{key}": x for key, x in old.items()}


def backbone(name):
    """Returns the tensors without the classifier."""
    return {k: x for k, x in state_dict(name).items() if not k.startswith("fc.")}


def _tensor(key, shape):
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    x = rng.standard_normal(shape).astype("float32")
    if key.endswith("running_var"):
        return 1 + 0.1 * abs(x)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * x
    if len(shape) == 1:
        return 1 + 0.1 * x
    return x * np.float32((2 / np.prod(shape[1:])) ** 0.5)


def vit_tensor(key, shape):
    """Returns a tensor of a vision transformer by timm's name."""
    if len(shape) == 3:  # Tokens and position embeddings.
        return 0.5 * np.random.RandomState(zlib.crc32(key.encode())).randn(*shape).astype("float32")
    return _tensor(key, shape)


def vit_images(size):
    """Returns two normalised images of a size."""
    return np.random.RandomState(size).randn(2, size, size, 3).astype("float32")


SMALL = {"features": 48, "heads": 3, "depth": 1}
TIMMS_SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 1}
REDUCED = {
    "convnext_tiny": (
        "convnext_tiny",
        {"stage_sizes": (1, 1, 1, 1), "width": 8},
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
        (64, 75),
    ),
    "vit_base_patch16_siglip": ("vit_base_patch16_siglip_224", SMALL, TIMMS_SMALL, (224, 80)),
    "vit_base_patch32_siglip": ("vit_base_patch32_siglip_256", SMALL, TIMMS_SMALL, (160,)),
    "vit_so400m_patch14_siglip": (
        "vit_so400m_patch14_siglip_224",
        SMALL | {"hidden": 179},
        TIMMS_SMALL,
        (98,),
    ),
    "vit_base_patch16_siglip_gap": (
        "vit_base_patch16_siglip_gap_224",
        SMALL,
        TIMMS_SMALL,
        (80,),
    ),
    "vit_giant_patch14_dinov2": (
        "vit_giant_patch14_dinov2",
        SMALL | {"hidden": 256},
        TIMMS_SMALL,
        (98, 140),
    ),
}
"""By backbone: timm's name, options that make it small, timm's names of them, sizes of images."""


def samples(tensors):
    """Returns up to about 50 numbers of each tensor, by PyTorch's names in their order."""
    flat = [tensors[key].reshape(-1) for key in sorted(tensors)]
    return np.concatenate([x[:: max(1, x.size // 50)] for x in flat])
