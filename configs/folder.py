"""Any folder of images: ROOT/train/CLASS/* to train on, ROOT/test/CLASS/* to test on.

python scripts/train.py --config=configs/folder.py:ps --workdir=runs/mine --config.data.root=ROOT

The settings are the official CARS196 recipe with a ResNet-50 from random weights. For small images
set `--config.data.image_size=32 --config.data.resize=32 --config.model.stem=small`; for images
with a left and a right, such as letters, set `--noconfig.data.augmentation.flip`.

Our choice: ratio and alpha of PS as on CARS196; of MemVir its warm-up, and N = 20, M = 10, the
smaller of its authors' N and of their M, since a folder may have many more classes than CARS196 and
memory grows with N, M and classes. Scales, margins and centres are the losses' defaults, which
their papers or CARS196's READMEs have.
Expected scores: what the images allow.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs


def get_config(variant: str = "baseline") -> ConfigDict:
    """The settings of a variant, such as `baseline`, `ps`, `memvir` or `ps_memvir_proxy_nca`."""
    config = configs.default()
    config.batch_size = 64
    config.data.update(image_size=128, resize=146)
    config.model.update(backbone="resnet18", pretrained="none", freeze_bn=False)
    # From random weights the official settings for fine-tuning would be slow.
    config.optimizer.update(learning_rate=1e-3, eps=1e-3)
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 20, "step_gap": 10, "warmup_epochs": 40},
    )
