"""In-Shop Clothes: 3,997 articles to train on; 14,218 queries in a gallery of 12,612 images.

python scripts/prepare_data.py inshop --source=DIR --out=data/inshop
python scripts/train.py --config=configs/inshop.py:ps_norm_softmax --workdir=runs/inshop_ps

No source gives settings for this data set; all are our choice. Recipe, ratio and alpha of PS are
those of CARS196, for want of others; scales, margins and centres are the losses' defaults, which
their papers or CARS196's READMEs have.
N = 5 and M = 20 keep the memory at 0.9 GB: 105 steps of 3,997 proxies of 512 numbers. SoftTriple
remembers ten centres a class, and takes 8.7 GB: choose a smaller `memvir.num_steps` or
`loss.centers_per_class`, or `memvir.dtype=bfloat16`, if that is too much. Epochs and warm-up of
MemVir are about as many steps as on CARS196.
Expected scores: none. Nobody published any for this recipe that we know of, and none were measured
here: it needs the images, the weights and a GPU.
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
