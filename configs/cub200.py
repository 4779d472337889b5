"""CUB-200-2011: 100 species of birds to train on, 100 others to test on.

python scripts/prepare_data.py cub200 --download --source=downloads --out=data/cub200
python scripts/train.py --config=configs/cub200.py:ps_norm_softmax --workdir=runs/cub200_ps

No source gives settings for this data set; all are our choice. Recipe, epochs, ratio and alpha of
PS, N, M and warm-up of MemVir are those of CARS196, which has about as many classes and a third
more images; MemVir has Norm-SoftMax's N and M with every loss, so that losses differ in nothing
else. Scales, margins and centres are the losses' defaults, which their papers or CARS196's READMEs
have, since nobody tuned them here.
Expected scores: none. Nobody published any for this recipe that we know of, and none were measured
here: it needs the images, the weights and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """The settings of a variant, such as `norm_softmax`, `ps_proxy_nca` or `memvir_cosface`."""
    config = configs.default()
    config.data.update(name="cub200", root="data/cub200")
    method, _ = configs.parse_variant(variant)
    if "memvir" in method:
        config.epochs = 2000
        config.optimizer.decay_epochs = (2000,)
        config.evaluation.every_epochs = 10
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 45, "step_gap": 10, "warmup_epochs": 40},
    )
