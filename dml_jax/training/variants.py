"""Variants of a config: a method and a loss, such as `memvir_proxy_nca`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dml_jax import losses
from dml_jax._utils.errors import UserError
from dml_jax.models.embedder import HEAD
from dml_jax.published import Reference
from dml_jax.training.config import loss_to_dict
from dml_jax.training.origin import Origin

METHODS = ("baseline", "ps", "memvir", "ps_memvir", "memvir_baseline", "mixup", "manifold_mixup")
"""Methods for proxy losses; see `with_variant`."""
PAIR_METHODS = ("baseline", "xbm")
"""Methods for losses of pairs."""


_MIXUP_ALPHA = {"mixup": 1.0, "manifold_mixup": 2.0}


def with_variant(
    config: ConfigDict,
    variant: str,
    *,
    proxy_synthesis: Mapping[str, Any],
    memvir: Mapping[str, Any],
    xbm_steps: int = 16,
    loss_settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> ConfigDict:
    """Returns the config of a data set with a variant applied, locked.

    A variant is a method and a loss, `METHOD_LOSS`: the method one of `METHODS`, the loss any of
    `dml_jax.losses`. Either may be left out, for `baseline` and for `norm_softmax`.
    `memvir_baseline` is the bare loss with all other settings of `memvir`, such as its epochs and
    learning rates: the baseline of MemVir.

    For comparison there are `mixup`, of images with a proxy loss, `manifold_mixup`, at one of the
    first three places of the network (`dml_jax.mixup`), and losses of pairs, alone or with `xbm`
    (`dml_jax.xbm`). The weights of mixup are drawn from Beta(1, 1) and those of manifold mixup from
    Beta(2, 2), and a batch of pairs has four images of each class, as
    in the sources, unless the config has more than one already.

    Args:
        config: config of the data set; changed in place.
        variant: name of the variant, such as `memvir`, `ps_proxy_nca` or `baseline`.
        proxy_synthesis: settings of Proxy Synthesis for this data set, used by its variants.
        memvir: settings of MemVir for this data set, used by its variants.
        xbm_steps: steps in the memory of XBM for this data set, used by its variants.
        loss_settings: hyper-parameters that differ from the defaults of a loss, by loss.

    Raises:
        ValueError: unknown variant.
    """
    method, loss = parse_variant(variant)
    config.loss = ConfigDict(
        loss_to_dict(losses.create(loss, **(loss_settings or {}).get(loss, {})))
    )
    if method in ("ps", "ps_memvir"):
        config.proxy_synthesis.update(proxy_synthesis)
    if method in ("memvir", "ps_memvir"):
        config.memvir.update(memvir)
    if method in _MIXUP_ALPHA:
        config.mixup.alpha = _MIXUP_ALPHA[method]
    # Where the head alone trains, its inputs are the only place.
    if method == "manifold_mixup" and config.model.train_from != HEAD:
        config.mixup.depth = 2
    if loss in losses.pair_names() and config.data.n_instance == 1:
        config.data.n_instance = 4
    if method == "xbm":
        config.xbm.num_steps = xbm_steps
    return config.lock()


def parse_variant(variant: str) -> tuple[str, str]:
    """Returns the method and the loss of a variant; see `with_variant`.

    Raises:
        ValueError: unknown variant.
    """
    names = {f"{method}_{loss}": (method, loss) for method in METHODS for loss in losses.names()}
    names |= {
        f"{method}_{loss}": (method, loss)
        for method in PAIR_METHODS
        for loss in losses.pair_names()
    }
    names |= {method: (method, "norm_softmax") for method in METHODS}
    names |= {loss: ("baseline", loss) for loss in (*losses.names(), *losses.pair_names())}
    if variant not in names:
        raise UserError(f"unknown variant {variant!r}; choose one of {', '.join(sorted(names))}")
    return names[variant]


def origin_of(
    config_file: str, variant: str, globals: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Origin:
    """Returns the origin of a run: config file, variant, overrides and published scores.

    Args:
        config_file: config file as given on the command line.
        variant: variant of the config file; empty for the default.
        globals: globals of the config file; `PUBLISHED`, if defined, has scores by method and loss.
        overrides: other settings given on the command line, by path.
    """
    published: tuple[Reference, ...] = ()
    if "PUBLISHED" in globals:
        published = tuple(globals["PUBLISHED"].get(parse_variant(variant or "baseline"), ()))
    return Origin(config_file, variant, overrides, published)


def set_proxy_anchor_recipe(
    config: ConfigDict,
    *,
    learning_rate: float,
    freeze_bn: bool,
    decay_rate: float,
    decay_every: int,
) -> None:
    """Changes a config to the training recipe of the authors of Proxy-Anchor, except the loss.

    Source: github.com/tjddus9597/Proxy-Anchor-CVPR2020, its commands for BN-Inception and the
    defaults of its train.py.

    Args:
        config: config with the settings of the other losses; changed in place.
        learning_rate: learning rate of the network; that of the proxies is 100 times as large.
        freeze_bn: whether batch normalisation is frozen, with scale and bias.
        decay_rate: factor of the learning rates at each decay.
        decay_every: epochs between decays.
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
