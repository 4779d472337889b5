"""Writes tests/golden/vit.npz: features and gradients of timm's vision transformers.

pip install timm torch && python -m tests.golden.make_vit

The weights follow a rule (`tests.helpers.weights.vit_tensor`), so that nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import timm
import torch

from tests.helpers.weights import vit_images, vit_tensor

# Backbone, depth and size of images; one has all of its blocks.
CASES = [
    ("vit_tiny_patch16", 12, 160),
    ("vit_small_patch16", 2, 224),
    ("vit_small_patch16", 2, 160),
    ("vit_small_patch8", 2, 64),
    ("vit_small_patch8", 2, 96),
    ("vit_small_patch32", 2, 128),
    ("vit_small_patch32", 2, 224),
    ("vit_base_patch32_clip", 2, 224),
    ("vit_base_patch32_clip", 2, 128),
    ("vit_base_patch32_clip_quickgelu", 2, 128),
    ("vit_small_patch14_dinov2", 2, 98),
    ("vit_small_patch14_dinov2", 2, 140),
    ("vit_small_patch14_reg4_dinov2", 2, 98),
    ("vit_small_patch14_reg4_dinov2", 2, 140),
]
GRADIENTS = ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.1.attn.qkv.weight")


def golden(name: str, depth: int, size: int) -> dict[str, np.ndarray]:
    """Returns features and gradients of timm's model for images of a size."""
    timms = name if "dinov2" in name else f"{name}_224"
    model = timm.create_model(timms, depth=depth, num_classes=0, dynamic_img_size=True).eval()
    state = {
        key: torch.tensor(vit_tensor(key, tuple(x.shape))) for key, x in model.state_dict().items()
    }
    model.load_state_dict(state)
    images = torch.tensor(vit_images(size).transpose(0, 3, 1, 2).copy())
    tokens = model.forward_features(images)
    token, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)
    (token * torch.cos(torch.arange(token.shape[1]))).sum().backward()
    gradients = {key: model.get_parameter(key).grad.numpy() for key in GRADIENTS}
    return {
        "token": token.detach().numpy(),
        "gap": patches.detach().numpy(),
        **{key: x.reshape(-1)[:: max(1, x.size // 200)] for key, x in gradients.items()},
    }


def main() -> None:
    """Writes the file."""
    found = {
        f"{name} {depth} {size} {key}": array
        for name, depth, size in CASES
        for key, array in golden(name, depth, size).items()
    }
    np.savez_compressed(Path(__file__).with_name("vit.npz"), **found)


if __name__ == "__main__":
    main()
