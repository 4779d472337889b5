"""Omniglot: the alphabets of small1 for training, the further ones of small2 for testing.

python scripts/prepare_data.py omniglot --download --source=downloads --out=data/omniglot
python scripts/train.py --config=configs/omniglot.py:ps --workdir=runs/omniglot_ps

Expected R@1 / RP / MAP@R in percent at the last epoch, after 60 epochs with decays at epochs 36 and
51, means of four seeds (docs/benchmarks.md has the command): `baseline` 80.0 / 51.3 / 42.0, `ps`
82.1 / 53.9 / 44.9. The 200 epochs of this file, and MemVir, have not been measured since the
initialisation of the head was corrected. The settings also suit a folder of other characters:
`--config.data.name=folder --config.data.root=DIR`.

The recipe and the settings of the regularisers are our choice. Ratio and alpha of PS and the
warm-up of MemVir are those of CARS196. An epoch has 21 steps, so N = 5 and M = 20 give virtual
classes that are one to five epochs old. Scales, margins and centres are the losses' defaults, from
their papers or from CARS196's READMEs.
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
