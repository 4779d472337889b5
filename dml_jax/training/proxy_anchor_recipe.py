"""The recipe of Proxy-Anchor's authors, which differs from that of the other losses."""

from ml_collections import ConfigDict


def set_recipe(
    config: ConfigDict,
    *,
    learning_rate: float,
    freeze_bn: bool,
    decay_rate: float,
    decay_every: int,
) -> None:
    """Changes a config to the recipe of Proxy-Anchor's authors; the loss itself is the variant's.

    Source: github.com/tjddus9597/Proxy-Anchor-CVPR2020, its commands for BN-Inception and the
    defaults of its train.py.

    Args:
        config: with the settings of the other losses.
        learning_rate: of the network; the proxies have a hundred times as much.
        freeze_bn: whether batch normalisation is frozen, with scale and bias.
        decay_rate: factor of the learning rates at each decay.
        decay_every: epochs between two decays.
    """
    config.epochs = 60
    config.batch_size = 180
    config.proxy_init = "normal_classes"
    config.model.update(
        pooling="gap+gmp",
        head_init="kaiming_fan_out",
        freeze_bn=freeze_bn,
        freeze_bn_affine=freeze_bn,
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=learning_rate,
        proxy_learning_rate=100 * learning_rate,
        eps=1e-8,
        weight_decay=1e-4,
        decay_rate=decay_rate,
        decay_epochs=(),
        decay_every=decay_every,
        clip_value=10.0,
        frozen_epochs=1,
    )
