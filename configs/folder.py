"""Any folder of images: ROOT/train/CLASS/* for training, ROOT/test/CLASS/* for testing.

python scripts/train.py --config=configs/folder.py:ps --workdir=runs/mine --config.data.root=ROOT

The settings suit a CPU: a ResNet-18 with random initial weights, 128 pixels, batches of 64. A run
uses at most 3.4 GB of resident memory, including its four input workers, and takes about a minute
per epoch for 1,000 images on two cores. After 6 epochs on 1,000 photographs of groceries (40
classes), R@1 and MAP@R of 1,000 photographs of other classes were 47.1 and 16.5 %; raw pixels at
32x32 have 28.8 and 5.4 %.

With pretrained weights, use the official recipe:

--config.model.backbone=resnet50 --config.model.pretrained=hf:timm/resnet50.tv_in1k
--config.model.freeze_bn --config.optimizer.learning_rate=1e-4 --config.optimizer.eps=0.01
--config.data.image_size=224 --config.data.resize=256

A step with a batch of 64 then needs 8.7 GB. `--config.micro_batches=4` reduces this to 2.6 GB and
takes about a third longer. Because batch normalisation is frozen, results change by rounding alone.
(On CPUs, JAX for Python 3.11 saves no memory by it.) On an accelerator also set
`--config.batch_size=128`, the official batch size, which needs 17 GB without micro-batches.

For small images set `--config.data.image_size=32 --config.data.resize=32` and
`--config.model.stem=small`. For images that are not mirror-invariant, such as letters, set
`--noconfig.data.augmentation.flip`.

Our choices: ratio and alpha of PS and the warm-up of MemVir as on CARS196. N = 20 and M = 10 are
the smaller values of MemVir's authors, because a folder may have many more classes than CARS196 and
memory grows with N, M and the number of classes. Scales, margins and centres are the losses'
defaults, from their papers or from CARS196's READMEs.
Expected scores depend on the images.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default


def get_config(variant: str = "baseline") -> ConfigDict:
    """Returns the configuration of a variant, such as `baseline`, `ps` or `memvir_proxy_nca`."""
    config = default()
    config.batch_size = 64
    config.data.update(image_size=128, resize=146)
    config.model.update(backbone="resnet18", pretrained="none", freeze_bn=False)
    # The official learning rate is for fine-tuning and slow from random weights.
    config.optimizer.update(learning_rate=1e-3, eps=1e-3)
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 20, "step_gap": 10, "warmup_epochs": 40},
    )
