"""CARS196: 98 models of cars to train on, 98 others to test on.

python scripts/prepare_data.py cars196 --source=DIR --out=data/cars196
python scripts/train.py --config=configs/cars196.py:ps_proxy_nca --workdir=runs/cars196_ps

Norm-SoftMax and Proxy-NCA, bare, with `ps_` and with `memvir_`, are set as the READMEs of
github.com/navervision/proxy-synthesis and github.com/navervision/MemVir set them. Expected
R@1 / RP / MAP@R in percent, as these READMEs give them: means of 8 runs, of 5 with MemVir, of each
score's best epoch on the test classes, which the last epoch's cannot exceed. `PUBLISHED` has the
deviations too.

              bare                   with PS                with MemVir
norm_softmax  83.08 / 35.23 / 24.92  84.25 / 36.76 / 26.51  86.11 / 38.29 / 28.46
proxy_nca     83.28 / 35.70 / 25.35  84.21 / 36.66 / 26.42  86.19 / 37.97 / 28.17

Our choice, since no source gives them, and without known scores: the other losses, with the
scales, margins and centres of their papers, and both regularisers together. The ratio and alpha of
PS are one for both losses of the READMEs, so they stand for all; N and M are Norm-SoftMax's, which
most of the other losses are made of.
Not run here: it needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs

_METRICS = ("recall@1", "r_precision", "map@r")
# Percent, mean and standard deviation of 8 runs, of 5 with MemVir.
PUBLISHED = {
    variant: dict(zip(_METRICS, scores, strict=True))
    for variant, scores in {
        ("baseline", "norm_softmax"): ((83.08, 0.21), (35.23, 0.34), (24.92, 0.35)),
        ("ps", "norm_softmax"): ((84.25, 0.31), (36.76, 0.20), (26.51, 0.18)),
        ("memvir", "norm_softmax"): ((86.11, 0.19), (38.29, 0.21), (28.46, 0.22)),
        ("baseline", "proxy_nca"): ((83.28, 0.36), (35.70, 0.21), (25.35, 0.18)),
        ("ps", "proxy_nca"): ((84.21, 0.21), (36.66, 0.18), (26.42, 0.20)),
        ("memvir", "proxy_nca"): ((86.19, 0.39), (37.97, 0.13), (28.17, 0.14)),
    }.items()
}


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """The settings of a variant, such as `norm_softmax`, `ps_proxy_nca` or `memvir_cosface`."""
    config = configs.default()
    config.data.update(name="cars196", root="data/cars196")
    method, loss = configs.parse_variant(variant)
    if "memvir" in method:
        config.epochs = 2000
        config.optimizer.decay_epochs = (2000,)
        config.evaluation.every_epochs = 10
        init = {"norm_softmax": "uniform_classes", "proxy_nca": "normal_dim"}
        config.proxy_init = init.get(loss, config.proxy_init)
    num_steps, step_gap = (20, 25) if loss == "proxy_nca" else (45, 10)
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": num_steps, "step_gap": step_gap, "warmup_epochs": 40},
    )
