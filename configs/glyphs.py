"""Letters in 16 typefaces, embedded: train on Latin and Greek, test on scripts never seen.

There are 423 training classes with 5,702 images and 286 test classes with 3,204 images. Letters
that look the same are one class, and no image occurs twice.

python scripts/train.py --config=configs/glyphs.py:memvir --workdir=runs/glyphs_memvir

Expected R@1 / RP / MAP@R in percent of the last epoch, means of three seeds (docs/benchmarks.md):
`baseline` 90.4 / 65.1 / 59.3, `ps` 90.7 / 64.9 / 59.2, `memvir` 88.6 / 60.9 / 54.4.

The recipe is our choice, made for a minute or two on two CPU cores, and so are the regularisers'
settings: ratio and alpha of PS as on CARS196; of MemVir a warm-up of half the epochs, and N = 5,
M = 3, which is 20 steps, so that the memory is full for most of the 132 steps that are left.
Scales, margins and centres are the losses' defaults, which their papers or CARS196's READMEs have.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs


def get_config(variant: str = "baseline") -> ConfigDict:
    """The settings of a variant, such as `baseline`, `ps`, `memvir` or `ps_memvir_proxy_nca`."""
    config = configs.default()
    config.epochs = 24
    config.data.update(
        name="glyphs",
        image_size=32,
        resize=32,
        # A mirrored letter is another letter.
        augmentation={"crop_scale": (0.8, 1.0), "flip": False},
        # Letters are decoded faster than worker processes are started.
        num_workers=0,
    )
    config.model.update(backbone="conv4", width=48, pretrained="none", dim=128, freeze_bn=False)
    config.optimizer.update(learning_rate=4e-3, eps=1e-3, decay_epochs=(22,))
    config.evaluation.every_epochs = 6
    config.checkpoint.every_epochs = 6
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 3.0, "alpha": 1.0},
        memvir={"num_steps": 1, "step_gap": 15, "warmup_epochs": 3},
    )
