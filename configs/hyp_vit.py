"""A ViT-S/16 with the recipe of Hyperbolic Vision Transformers and the losses of this project.

python scripts/prepare_data.py cub200 --download --source=downloads --out=data/cub200
python scripts/train.py --config=configs/hyp_vit.py:cub200_ps --workdir=runs/hyp_vit_cub200_ps

A variant is a data set (`cub200`, `cars196`, `sop`, `inshop`), a method and a loss, such as
`sop_ps_proxy_anchor`; a variant without a data set is one of `cub200`.

Source: Ermolov et al., CVPR 2022, arXiv 2203.10833, and github.com/htdt/hyp_metric: the commands of
its README for `vit_small_patch16_224`, and the defaults of its train.py. From there: timm's weights
of that name, class token, 128 dimensions, AdamW at 3e-5 with PyTorch's weight decay of 0.01, norm
of the gradient at most 3, no schedule, crops of at least a fifth of the image, batches of 900
(Cars: 882) with 9 images of each class (SOP and In-Shop: 2), and for CUB a resize to 256.

What differs:

- The loss. Theirs compares the images of a batch, in hyperbolic space with clipped features, and
  has no proxies. Rate of the proxies, scales and ratio of Proxy Synthesis are those of CARS196.
- Their epoch takes the images of each class once: 50 steps for CUB, 300 for Cars, 5,000 for SOP and
  3,200 for In-Shop. The epochs here are passes over all images, as many as make so many steps.
- They freeze the projection of the patches; here class token and position embeddings too.
- Their head is orthogonal at first; here it has PyTorch's initial values.
- Their crops are interpolated bicubically; here they are reduced by area averaging and enlarged
  bilinearly. Their half precision is float16; here it is bfloat16.
- MemVir's settings are guesses: two steps, one step apart, after a third of the epochs.

Their R@1 in percent, of the 384 features of the network without the head (table in the README,
Hyp-ViT): CUB 85.6, Cars 86.5, SOP 85.9, In-Shop 92.5. Runs of this config score the 128 dimensions
of the head instead. Not measured here: training needs the images, the weights and a GPU.

Peers in this recipe are the variants of losses of pairs, such as `cub200_xbm_triplet`. The triplet
baseline of Open Metric Learning (github.com/OML-Team/open-metric-learning), soft triplets with a
memory of 50 batches on DINO's ViT-S/16, has another recipe; its README reports an R@1 of 83.7 for
CUB, 90.7 for Cars, 86.6 for SOP and 92.1 for In-Shop.
"""

from typing import Any

from ml_collections import ConfigDict

from dml_jax.training import variants
from dml_jax.training.config import default

DATA_SETS: dict[str, dict[str, Any]] = {
    "cub200": {"epochs": 9, "resize": 256},
    "cars196": {"epochs": 34, "batch_size": 882},
    "sop": {"epochs": 76, "n_instance": 2, "recall_at": (1, 10, 100, 1000)},
    "inshop": {"epochs": 115, "n_instance": 2, "recall_at": (1, 10, 20, 40)},
}
"""Settings that differ between the data sets."""


def get_config(variant: str = "cub200") -> ConfigDict:
    """Returns the configuration of a variant, such as `cub200`, `sop_ps` or `cars196_proxy_nca`."""
    name, _, method_and_loss = variant.partition("_")
    if name not in DATA_SETS:
        name, method_and_loss = "cub200", variant
    given = DATA_SETS[name]
    config = default()
    config.epochs = given["epochs"]
    config.batch_size = given.get("batch_size", 900)
    config.data.update(
        name=name,
        root=f"data/{name}",
        n_instance=given.get("n_instance", 9),
        resize=given.get("resize", 224),
    )
    config.data.augmentation.crop_scale = (0.2, 1.0)
    config.model.update(
        backbone="vit_small_patch16",
        pretrained="hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
        normalisation="inception",
        pooling="token",
        dim=128,
        train_from="blocks.0",
        dtype="bfloat16",
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=3e-5,
        eps=1e-8,
        weight_decay=0.01,
        decay_epochs=(),
        clip_norm=3.0,
    )
    config.evaluation.recall_at = given.get("recall_at", (1, 2, 4, 8))
    return variants.with_variant(
        config,
        method_and_loss or "norm_softmax",
        proxy_synthesis={"ratio": 1.0, "alpha": 0.4},
        memvir={"num_steps": 2, "step_gap": 1, "warmup_epochs": given["epochs"] // 3},
        loss_settings={"soft_triple": {"tau": 0.2}},
    )
