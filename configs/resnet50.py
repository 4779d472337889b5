"""ResNet-50 with the recipe of the authors of Proxy-Anchor, and any loss of this project.

python scripts/prepare_data.py cub200 --download --source=downloads --out=data/cub200
python scripts/train.py --config=configs/resnet50.py:cub200_proxy_anchor --workdir=runs/resnet50

A variant is a data set (`cub200` or `cars196`), a method and a loss, such as
`cars196_memvir_cosface`; a variant without a data set is one of `cub200`. `cub200_proxy_anchor` and
`cars196_proxy_anchor` are the authors' own runs.

Source: the commands of github.com/tjddus9597/Proxy-Anchor-CVPR2020 for ResNet-50 and the defaults
of its train.py: batches of 120, a frozen network for five epochs, frozen batch normalisation,
learning rates halved every 5 (CUB) or 10 (Cars) epochs. Its README reports the best R@1 of 60
epochs on the test classes, in percent: CUB 69.9, Cars 87.7. The weights are those of torchvision's
first release, from the hub.

Ratio and alpha of Proxy Synthesis are those of CARS196. MemVir's settings are guesses: two steps,
ten steps apart, after the frozen epochs. Not measured here: training needs the images, the weights
and a GPU.
"""

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default

DECAY_EVERY = {"cub200": 5, "cars196": 10}
"""Epochs between decays of the learning rates."""
FROZEN_EPOCHS = 5


def get_config(variant: str = "cub200") -> ConfigDict:
    """Returns the configuration of a variant, such as `cub200_proxy_anchor` or `cars196_ps`."""
    name, _, method_and_loss = variant.partition("_")
    if name not in DECAY_EVERY:
        name, method_and_loss = "cub200", variant
    config = default()
    config.data.update(name=name, root=f"data/{name}")
    variants.set_proxy_anchor_recipe(
        config,
        learning_rate=1e-4,
        freeze_bn=True,
        decay_rate=0.5,
        decay_every=DECAY_EVERY[name],
    )
    config.batch_size = 120
    config.optimizer.frozen_epochs = FROZEN_EPOCHS
    config.model.update(backbone="resnet50", pretrained="hf:timm/resnet50.tv_in1k")
    return variants.with_variant(
        config,
        method_and_loss or "norm_softmax",
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 2, "step_gap": 10, "warmup_epochs": FROZEN_EPOCHS},
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
