"""CARS196: 98 models of cars to train on, 98 others to test on.

python scripts/prepare_data.py cars196 --source=DIR --out=data/cars196
python scripts/train.py --config=configs/cars196.py:ps_proxy_nca --workdir=runs/cars196_ps

Norm-SoftMax and Proxy-NCA, bare, with `ps_` and with `memvir_`, are set as the READMEs of
github.com/navervision/proxy-synthesis and github.com/navervision/MemVir set them. Expected
R@1 / RP / MAP@R in percent, as these READMEs give them: means of 8 runs, of 5 with MemVir, of each
score's best epoch on the test classes, which the last epoch's cannot exceed. dml_jax/published.py
has the deviations too, and the R@1 of both papers: Norm-SoftMax 83.3, with PS 84.7, with MemVir
86.8.

              bare                   with PS                with MemVir
norm_softmax  83.08 / 35.23 / 24.92  84.25 / 36.76 / 26.51  86.11 / 38.29 / 28.46
proxy_nca     83.28 / 35.70 / 25.35  84.21 / 36.66 / 26.42  86.19 / 37.97 / 28.17

Proxy-Anchor has its authors' recipe, with PS and MemVir added to it, and
with MemVir's epochs. `memvir_baseline` is the bare loss on MemVir's schedule and with its proxy
initialiser: the baseline that MemVir is compared with.
Our choice, since we know of no source: the other losses' settings, which are the scales, margins
and centres of their papers, and both regularisers together. The ratio and alpha of PS are one for
both losses of the READMEs, so they stand for all; N and M are Norm-SoftMax's, which most of the
other losses are made of.
Not run here: it needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import published
from dml_jax.training import variants
from dml_jax.training.config import default

PUBLISHED = published.PUBLISHED["cars196"]


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """The settings of a variant, such as `norm_softmax`, `ps_proxy_nca` or `memvir_cosface`."""
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
        # The default of SoftTriple's authors.
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
