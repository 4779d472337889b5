"""Letters in 16 typefaces, included: Latin and Greek for training, other scripts for testing.

There are 423 training classes with 5,702 images and 286 test classes with 3,204 images. Letters
that look the same are one class, and no image occurs twice.

python scripts/train.py --config=configs/glyphs.py:memvir --workdir=runs/glyphs_memvir

Expected R@1 / RP / MAP@R in percent at the last epoch, means of five seeds (docs/benchmarks.md):
`baseline` 98.6 / 73.4 / 70.2, `ps` 98.9 / 76.7 / 74.0, `memvir` 98.7 / 75.0 / 72.1, `ps_memvir`
99.0 / 76.8 / 74.1. A run takes one to two minutes on two CPU cores.

The recipe is our choice. Learning rates, decay, ratio and alpha of PS, and N, M and warm-up of
MemVir were tuned by MAP@R on held-out training classes, with equally many trials for each method
(docs/letters_search.csv). The scale is that of the papers, 23. A scale of 5 is better for these
letters; Proxy Synthesis gains nothing there. Margins and centres of other losses are their
defaults.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default


def get_config(variant: str = "baseline") -> ConfigDict:
    """Returns the configuration of a variant, such as `baseline`, `ps` or `memvir_proxy_nca`."""
    config = default()
    config.epochs = 16
    config.data.update(
        name="glyphs",
        image_size=32,
        resize=32,
        # Letters are not mirror-invariant.
        augmentation={"crop_scale": (0.8, 1.0), "flip": False},
        # Decoding letters takes less time than starting worker processes.
        num_workers=0,
    )
    config.model.update(backbone="conv4", width=48, pretrained="none", dim=128, freeze_bn=False)
    config.optimizer.update(learning_rate=4e-3, eps=1e-3, decay_epochs=(14,))
    config.evaluation.every_epochs = 4
    config.checkpoint.every_epochs = 4
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 3.0, "alpha": 1.0},
        memvir={"num_steps": 1, "step_gap": 15, "warmup_epochs": 3},
    )
