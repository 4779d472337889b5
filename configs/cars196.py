"""CARS196: 98 car models for training, 98 other models for testing.

python scripts/prepare_data.py cars196 --source=DIR --out=data/cars196
python scripts/train.py --config=configs/cars196.py:ps_proxy_nca --workdir=runs/cars196_ps

Norm-SoftMax and Proxy-NCA, alone, with `ps_` and with `memvir_`, have the settings of the READMEs
of github.com/navervision/proxy-synthesis and github.com/navervision/MemVir. The table has their
R@1 / RP / MAP@R in percent: means of 8 runs, with MemVir of 5 runs, each at the metric's best epoch
on the test classes. The last epoch cannot score higher. dml_jax/published.py also has the standard
deviations and the R@1 of both papers: Norm-SoftMax 83.3, with PS 84.7, with MemVir 86.8.

              alone                  with PS                with MemVir
norm_softmax  83.08 / 35.23 / 24.92  84.25 / 36.76 / 26.51  86.11 / 38.29 / 28.46
proxy_nca     83.28 / 35.70 / 25.35  84.21 / 36.66 / 26.42  86.19 / 37.97 / 28.17

Proxy-Anchor has the recipe of its authors, with PS or MemVir added, and with MemVir's epochs where
MemVir is used. `memvir_baseline` is the loss alone on MemVir's schedule and with MemVir's proxy
initialisation: the baseline of the MemVir variants.
Our choices, for which we know no source: the other losses, with the scales, margins and centres of
their papers, and the combination of both regularisers. The READMEs use the same ratio and alpha of
PS for both losses, so all losses use them. N and M of MemVir are those of Norm-SoftMax, of which
most other losses are variants.
Not run here: training needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import published
from dml_jax.training import variants
from dml_jax.training.config import default

PUBLISHED = published.PUBLISHED["cars196"]


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """Returns the configuration of a variant, such as `ps_proxy_nca` or `memvir_cosface`."""
    config = default()
    config.data.update(name="cars196", root="data/cars196")
    method, loss = variants.parse_variant(variant)
    if loss == "proxy_anchor":
        variants.set_proxy_anchor_recipe(
            config, learning_rate=1e-4, freeze_bn=True, decay_rate=0.5, decay_every=20
        )
    if "memvir" in method:
        config.epochs = 2000
        config.optimizer.update(decay_epochs=(2000,), decay_every=0)
        config.evaluation.every_epochs = 10
        config.checkpoint.every_epochs = 10
        init = {"norm_softmax": "uniform_classes", "proxy_nca": "normal_dim"}
        config.proxy_init = init.get(loss, config.proxy_init)
    num_steps, step_gap = (20, 25) if loss == "proxy_nca" else (45, 10)
    return variants.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": num_steps, "step_gap": step_gap, "warmup_epochs": 40},
        # An epoch's.
        xbm_steps=62,
        # The default in the code of SoftTriple's authors.
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
