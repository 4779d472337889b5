"""In-Shop Clothes: 3,997 articles to train on; 14,218 queries in a gallery of 12,612 images.

python scripts/prepare_data.py inshop --source=DIR --out=data/inshop
python scripts/train.py --config=configs/inshop.py:ps_norm_softmax --workdir=runs/inshop_ps

No source gives settings for this data set. These are our choice: the recipe of CARS196, but N and M
of MemVir such that the memory takes 0.9 GB (105 steps of 3,997 proxies of 512 numbers), and epochs
and warm-up such that they are about as many steps as there. No scores are known to us for this
recipe, and none were measured here.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """The settings of a variant, such as `norm_softmax`, `ps_proxy_nca` or `memvir_cosface`."""
    config = configs.default()
    config.data.update(name="inshop", root="data/inshop")
    config.evaluation.recall_at = (1, 10, 20, 40)
    method, _ = configs.parse_variant(variant)
    if "memvir" in method:
        config.epochs = 600
        config.optimizer.decay_epochs = (600,)
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 5, "step_gap": 20, "warmup_epochs": 12},
    )
