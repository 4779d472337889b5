"""In-Shop Clothes: 3,997 items for training; 14,218 test queries in a gallery of 12,612 images.

python scripts/prepare_data.py inshop --source=DIR --out=data/inshop
python scripts/train.py --config=configs/inshop.py:ps_norm_softmax --workdir=runs/inshop_ps

The official READMEs have no settings for this data set. Recipe, ratio and alpha of PS are those of
CARS196. Scales, margins and centres are the losses' defaults, from their papers or from CARS196's
READMEs. Proxy-Anchor has the recipe of its authors, with MemVir's epochs where MemVir is used.
N = 5 and M = 20 keep the memory at 0.9 GB: 105 steps of 3,997 proxies of 512 numbers. SoftTriple
has ten centres per class, so its memory takes 8.7 GB; if that is too much, reduce
`memvir.num_steps` or `loss.centers_per_class`, or set `memvir.dtype=bfloat16`. MemVir's epochs and
warm-up are about as many steps as on CARS196.
Published R@1 in percent (dml_jax/published.py has all losses): Norm-SoftMax 90.4, with PS 91.5;
none with MemVir. Not measured here: training needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import published
from dml_jax.training import variants
from dml_jax.training.config import default

PUBLISHED = published.PUBLISHED["inshop"]


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """Returns the configuration of a variant, such as `ps_proxy_nca` or `memvir_cosface`."""
    config = default()
    config.data.update(name="inshop", root="data/inshop")
    config.evaluation.recall_at = (1, 10, 20, 40)
    method, loss = variants.parse_variant(variant)
    if loss == "proxy_anchor":
        variants.set_proxy_anchor_recipe(
            config, learning_rate=6e-4, freeze_bn=False, decay_rate=0.25, decay_every=20
        )
    if "memvir" in method:
        config.epochs = 600
        config.optimizer.update(decay_epochs=(600,), decay_every=0)
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 5, "step_gap": 20, "warmup_epochs": 12},
        # An epoch's.
        xbm_steps=202,
        # The default in the code of SoftTriple's authors.
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
