"""CUB-200-2011: 100 bird species for training, 100 other species for testing.

python scripts/prepare_data.py cub200 --download --source=downloads --out=data/cub200
python scripts/train.py --config=configs/cub200.py:ps_norm_softmax --workdir=runs/cub200_ps

The official READMEs have no settings for this data set. Ours are those of CARS196, which has about
as many classes and a third more images: recipe, epochs, ratio and alpha of PS, and N, M and warm-up
of MemVir. All losses use Norm-SoftMax's N and M, so that they differ in the loss alone. Scales,
margins and centres are the losses' defaults, from their papers or from CARS196's READMEs.
Proxy-Anchor has the recipe of its authors, with MemVir's epochs where MemVir is used.
Published R@1 in percent (dml_jax/published.py has all losses): Norm-SoftMax 64.9, with PS 66.0,
with MemVir 67.3. Not measured here: training needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import published
from dml_jax.training import variants
from dml_jax.training.config import default

PUBLISHED = published.PUBLISHED["cub200"]


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """Returns the configuration of a variant, such as `ps_proxy_nca` or `memvir_cosface`."""
    config = default()
    config.data.update(name="cub200", root="data/cub200")
    method, loss = variants.parse_variant(variant)
    if loss == "proxy_anchor":
        variants.set_proxy_anchor_recipe(
            config, learning_rate=1e-4, freeze_bn=True, decay_rate=0.5, decay_every=10
        )
    if "memvir" in method:
        config.epochs = 2000
        config.optimizer.update(decay_epochs=(2000,), decay_every=0)
        config.evaluation.every_epochs = 10
        config.checkpoint.every_epochs = 10
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 45, "step_gap": 10, "warmup_epochs": 40},
        # An epoch's.
        xbm_steps=45,
        # The default in the code of SoftTriple's authors.
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
