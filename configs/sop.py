"""Stanford Online Products: 11,318 products for training, 11,316 others for testing.

python scripts/prepare_data.py sop --download --source=downloads --out=data/sop
python scripts/train.py --config=configs/sop.py:ps_norm_softmax --workdir=runs/sop_ps

The official READMEs have no settings for this data set. Recipe, ratio and alpha of PS are those of
CARS196. Scales, margins and centres are the losses' defaults, from their papers or from CARS196's
READMEs. Proxy-Anchor has the recipe of its authors, with MemVir's epochs where MemVir is used.
N = 5 and M = 20 keep the memory at 1.2 GB: 105 steps of 11,318 proxies of 512 numbers in bfloat16;
CARS196's N and M would take 12 GB in float32. SoftTriple has ten centres per class, so its memory
takes 12.3 GB; if that is too much, reduce `memvir.num_steps` or `loss.centers_per_class`. MemVir's
epochs and warm-up are about as many steps as on CARS196.
Published R@1 in percent (dml_jax/published.py has all losses): Norm-SoftMax 78.6, with PS 79.6,
with MemVir 79.6. Not measured here: training needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import published
from dml_jax.training import variants
from dml_jax.training.config import default

PUBLISHED = published.PUBLISHED["sop"]


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """Returns the configuration of a variant, such as `ps_proxy_nca` or `memvir_cosface`."""
    config = default()
    config.data.update(name="sop", root="data/sop")
    config.evaluation.recall_at = (1, 10, 100, 1000)
    method, loss = variants.parse_variant(variant)
    if loss == "proxy_anchor":
        variants.set_proxy_anchor_recipe(
            config, learning_rate=6e-4, freeze_bn=False, decay_rate=0.25, decay_every=20
        )
    if "memvir" in method:
        config.epochs = 300
        config.optimizer.update(decay_epochs=(300,), decay_every=0)
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 5, "step_gap": 20, "warmup_epochs": 5, "dtype": "bfloat16"},
        # An epoch's.
        xbm_steps=465,
        # The default in the code of SoftTriple's authors.
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
