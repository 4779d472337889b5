"""Any folder of images: ROOT/train/CLASS/* to train on, ROOT/test/CLASS/* to test on.

python scripts/train.py --config=configs/folder.py:ps --workdir=runs/mine --config.data.root=ROOT

The settings are for a CPU: a ResNet-18 from random weights, 128 pixels, 64 images a batch. A run
has at most 3.4 GB resident with its four input workers, and takes about a minute an epoch for 1,000
pictures on two cores. After 6 epochs of 1,000 photographs of groceries (40 classes), R@1 and MAP@R
of 1,000 of other classes were 47.1 and 16.5 %; raw pixels at 32x32 have 28.8 and 5.4 %.

With pretrained weights, add the official recipe:

--config.model.backbone=resnet50 --config.model.pretrained=hf:timm/resnet50.tv_in1k
--config.model.freeze_bn --config.optimizer.learning_rate=1e-4 --config.optimizer.eps=0.01
--config.data.image_size=224 --config.data.resize=256

With 64 images a batch a step then needs 8.7 GB. `--config.micro_batches=4` makes that 2.6 GB, for
about a third more time, and changes numbers by rounding alone, since batch normalisation is
frozen (on CPUs not with Python 3.11, whose JAX saves nothing by it). On an accelerator also set
`--config.batch_size=128`, the official one, which needs 17 GB in one part.

For small images set `--config.data.image_size=32 --config.data.resize=32` and
`--config.model.stem=small`; for images with a left and a right, such as letters,
`--noconfig.data.augmentation.flip`.

Our choice: ratio and alpha of PS as on CARS196; of MemVir its warm-up, and N = 20, M = 10, the
smaller of its authors' N and of their M, since a folder may have many more classes than CARS196 and
memory grows with N, M and classes. Scales, margins and centres are the losses' defaults, which
their papers or CARS196's READMEs have.
Expected scores: what the images allow.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default


def get_config(variant: str = "baseline") -> ConfigDict:
    """The settings of a variant, such as `baseline`, `ps`, `memvir` or `ps_memvir_proxy_nca`."""
    config = default()
    config.batch_size = 64
    config.data.update(image_size=128, resize=146)
    config.model.update(backbone="resnet18", pretrained="none", freeze_bn=False)
    # From random weights the official settings for fine-tuning would be slow.
    config.optimizer.update(learning_rate=1e-3, eps=1e-3)
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 20, "step_gap": 10, "warmup_epochs": 40},
    )
