"""ORL faces (AT&T Laboratories Cambridge): 20 people for training, 20 others for testing.

python scripts/train.py --config=configs/orl_faces.py:ps --workdir=runs/orl_faces_ps

The photographs come with the `demo` extra. Expected at the last epoch: `baseline` has R@1 96.5 and
MAP@R 63.6 (one seed, measured here), in about 5 minutes on 2 CPU cores. Raw pixels of the same
square crop have 97.5 and 54.1. The other variants have not been measured.

The recipe and the settings of the regularisers are our choice. Ratio and alpha of PS are those of
CARS196. N = 5 and M = 5 of MemVir span 30 of the run's 500 steps; the warm-up is a fifth of the
run, in which embeddings change fast. Scales, margins and centres are the losses' defaults, from
their papers or from CARS196's READMEs.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default


def get_config(variant: str = "baseline") -> ConfigDict:
    """Returns the configuration of a variant, such as `baseline`, `ps` or `memvir_proxy_nca`."""
    config = default()
    config.epochs = 100
    config.batch_size = 40
    config.data.update(
        name="orl_faces",
        n_instance=2,
        image_size=64,
        resize=64,
        augmentation={"crop_scale": (0.3, 1.0)},
        num_workers=0,
    )
    config.model.update(
        backbone="resnet18",
        width=16,
        stem="small",
        pretrained="none",
        pooling="gap+gmp",
        dim=128,
        freeze_bn=False,
    )
    config.optimizer.update(learning_rate=1e-3, eps=1e-3, weight_decay=2e-3, decay_epochs=(60,))
    config.evaluation.every_epochs = 20
    config.checkpoint.every_epochs = 10
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 5, "step_gap": 5, "warmup_epochs": 20},
    )
