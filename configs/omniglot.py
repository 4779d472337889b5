"""Omniglot: the alphabets of small1 for training, the further ones of small2 for testing.

python scripts/prepare_data.py omniglot --download --source=downloads --out=data/omniglot
python scripts/train.py --config=configs/omniglot.py:ps --workdir=runs/omniglot_ps

Expected R@1 / RP / MAP@R in percent at the last epoch, means of five seeds (docs/benchmarks.md has
the commands): `ps` 82.6 / 55.3 / 47.0, `ps_memvir` 83.4 / 55.7 / 47.5; with its own best scale, 12,
`memvir` 84.8 / 57.5 / 49.4; with its own best learning rate, 4e-3, `baseline` 80.4 / 53.0 / 44.5.
The settings also suit a folder of other characters: `--config.data.name=folder
--config.data.root=DIR`.

The recipe is our choice. Learning rate, scale, N and M were chosen by MAP@R on held-out training
classes, in four trials of each method. An epoch has 21 steps, so M = 21 makes the virtual classes
one epoch old. Ratio and alpha of PS and the warm-up of MemVir are those of CARS196. Margins and
centres of other losses are their defaults.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default


def get_config(variant: str = "baseline") -> ConfigDict:
    """Returns the configuration of a variant, such as `baseline`, `ps` or `memvir_proxy_nca`."""
    config = default()
    config.epochs = 200
    config.data.update(
        name="omniglot",
        root="data/omniglot",
        image_size=32,
        resize=32,
        # Drawings vary in rotation and position, but are not mirror-invariant.
        augmentation={
            "crop_scale": (1.0, 1.0),
            "flip": False,
            "rotation": 15.0,
            "zoom": 0.15,
            "shift": 0.06,
        },
        # For such small images worker processes cost more than they save.
        num_workers=0,
    )
    config.model.update(backbone="conv4", width=48, pretrained="none", dim=128, freeze_bn=False)
    config.optimizer.update(learning_rate=2e-3, eps=1e-3, decay_epochs=(183,))
    config.evaluation.every_epochs = 10
    config.checkpoint.every_epochs = 10
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 1, "step_gap": 21, "warmup_epochs": 40},
        loss_settings={"norm_softmax": {"scale": 8.0}},
    )
