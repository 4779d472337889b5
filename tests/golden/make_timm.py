"""Writes tests/golden/timm.npz: features, gradients and sizes of timm's smaller models.


pip install timm torch && python -m tests.golden.make_timm

The weights follow a rule (`tests.helpers.weights.vit_tensor`), so that nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.weights import REDUCED, samples, vit_images, vit_tensor

# Our name and timm's.
NAMES = {
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base")},
    **{
        f"vit_{name}": f"vit_{name}_{size}"
        for size, names in {
            224: "tiny_patch16 small_patch16 base_patch16 large_patch16 small_patch32 base_patch32 "
            "small_patch8 base_patch8 base_patch16_clip base_patch16_clip_quickgelu "
            "base_patch32_clip base_patch32_clip_quickgelu base_patch16_siglip "
            "base_patch16_siglip_gap so400m_patch14_siglip",
            256: "large_patch16_siglip base_patch32_siglip",
        }.items()
        for name in names.split()
    },
    **{
        f"vit_{size}_patch14_{registers}dinov2": f"vit_{size}_patch14_{registers}dinov2"
        for size in ("small", "base", "large", "giant")
        for registers in ("", "reg4_")
    },
}


def golden(timms: str, options: dict, size: int) -> dict[str, np.ndarray]:
    """Returns pooled features and gradients of timm's model for images of a size."""
    of_size = {} if timms.startswith("convnext") else {"dynamic_img_size": True}
    model = timm.create_model(timms, num_classes=0, **of_size, **options).eval()
    state = {
        key: torch.tensor(vit_tensor(key, tuple(x.shape))) for key, x in model.state_dict().items()
    }
    model.load_state_dict(state)
    images = torch.tensor(vit_images(size).transpose(0, 3, 1, 2).copy())
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    (pooled * torch.cos(torch.arange(pooled.shape[1]))).sum().backward()
    gradients = {key: x.grad.numpy() for key, x in model.named_parameters()}
    return {"pooled": pooled.detach().numpy(), "gradients": samples(gradients)}


def sizes(timms: str) -> tuple[int, int]:
    """Returns the number of parameters without a classifier, and of operations for one image.

    Two operations for each multiplication of a matrix product or a convolution with its addition.
    """
    with torch.device("meta"):
        model = timm.create_model(timms, num_classes=0).eval()
        image = torch.zeros(1, *model.pretrained_cfg["input_size"])
    with FlopCounterMode(display=False) as counter:
        model(image)
    return sum(x.numel() for x in model.parameters()), counter.get_total_flops()


def main() -> None:
    """Writes the file."""
    found = {
        f"{name} {size} {key}": array
        for name, (timms, _, options, image_sizes) in REDUCED.items()
        for size in image_sizes
        for key, array in golden(timms, options, size).items()
    }
    found |= {f"sizes {name}": np.array(sizes(timms)) for name, timms in NAMES.items()}
    np.savez_compressed(Path(__file__).with_name("timm.npz"), **found)


if __name__ == "__main__":
    main()
