"""Stanford Online Products: 11,318 products to train on, 11,316 others to test on.

python scripts/prepare_data.py sop --download --source=downloads --out=data/sop
python scripts/train.py --config=configs/sop.py:ps_norm_softmax --workdir=runs/sop_ps

No source gives settings for this data set. These are our choice: the recipe of CARS196, but N and M
of MemVir such that the memory takes 1.2 GB (105 steps of 11,318 proxies of 512 numbers in bfloat16,
where CARS196's N and M would take 12 GB in float32), and epochs and warm-up that are about
as many steps as there. No scores are known to us for this recipe, and none were measured here.
"""

from ml_collections import ConfigDict

from dml_jax import config as configs


def get_config(variant: str = "norm_softmax") -> ConfigDict:
    """The settings of a variant, such as `norm_softmax`, `ps_proxy_nca` or `memvir_cosface`."""
    config = configs.default()
    config.data.update(name="sop", root="data/sop")
    config.evaluation.recall_at = (1, 10, 100, 1000)
    method, _ = configs.parse_variant(variant)
    if "memvir" in method:
        config.epochs = 300
        config.optimizer.decay_epochs = (300,)
    return configs.with_variant(
        config,
        variant,
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 5, "step_gap": 20, "warmup_epochs": 5, "dtype": "bfloat16"},
    )
