"""The space of a search: which settings are searched, and between which bounds."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from dml_jax import losses
from dml_jax._utils.errors import UserError
from dml_jax.training.config import SWITCHES, parse


class Range(NamedTuple):
    """The bounds of a searched setting."""

    low: float
    high: float
    log: bool = False
    """Whether the logarithm is searched uniformly."""
    integer: bool = False


Space = Mapping[str, Range]
"""Ranges by path of the setting, such as `loss.scale`."""

_OPTIMIZER = {
    "optimizer.learning_rate": Range(1e-5, 1e-2, log=True),
    "optimizer.proxy_learning_rate": Range(1e-3, 1e-1, log=True),
}
_LOSSES = {
    "softmax": {},
    "virtual_softmax": {},
    "norm_softmax": {"loss.scale": Range(4, 64, log=True)},
    "proxy_nca": {"loss.scale": Range(2, 48, log=True)},
    "cosface": {"loss.scale": Range(8, 96, log=True), "loss.margin": Range(0.05, 0.5)},
    "arcface": {"loss.scale": Range(8, 96, log=True), "loss.margin": Range(0.05, 0.6)},
    "sphereface": {"loss.scale": Range(0.5, 16, log=True), "loss.margin": Range(1, 5)},
    "soft_triple": {
        "loss.la": Range(5, 60, log=True),
        "loss.gamma": Range(0.03, 0.3, log=True),
        "loss.margin": Range(0.0, 0.2),
    },
    "proxy_anchor": {"loss.alpha": Range(8, 64, log=True), "loss.margin": Range(0.0, 0.3)},
    "contrastive": {"loss.margin": Range(0.0, 0.9)},
    "multi_similarity": {
        "loss.scale_pos": Range(0.5, 10, log=True),
        "loss.scale_neg": Range(10, 100, log=True),
        "loss.threshold": Range(0.2, 0.8),
    },
    "triplet": {"loss.margin": Range(0.05, 0.5)},
}
_PROXY_SYNTHESIS = {
    "proxy_synthesis.ratio": Range(0.25, 3.0),
    "proxy_synthesis.alpha": Range(0.1, 2.0, log=True),
}
_MEMVIR = {
    "memvir.num_steps": Range(1, 10, log=True, integer=True),
    "memvir.step_gap": Range(1, 100, log=True, integer=True),
}
_MIXUP = {"mixup.alpha": Range(0.1, 4.0, log=True)}
_XBM = {
    "xbm.num_steps": Range(2, 100, log=True, integer=True),
    "xbm.weight": Range(0.1, 2.0, log=True),
}


def of_variant(
    config: ConfigDict, loss: str, overrides: Mapping[str, Range | None]
) -> dict[str, Range]:
    """Returns the search space of a variant: the defaults, changed by the config file.

    Args:
        config: config of the variant.
        loss: name of its loss; other losses than those of this package have no default ranges.
        overrides: `SPACE` of the config file: ranges by path, or None to exclude a setting.
            Settings that a variant does not use are left out.

    Raises:
        ValueError: a path names no setting, or a bound is impossible; the message lists all.
    """
    searched: dict[str, Range] = {**_OPTIMIZER, **_LOSSES.get(loss, {})}
    warmup = Range(0, max(config.epochs // 2, 1), integer=True)
    of_methods = {
        "proxy_synthesis": _PROXY_SYNTHESIS,
        "memvir": _MEMVIR | {"memvir.warmup_epochs": warmup},
        "mixup": _MIXUP,
        "xbm": _XBM | {"xbm.warmup_epochs": warmup},
    }
    unused = {method for method, switch in SWITCHES.items() if not config[method][switch]}
    for method, ranges in of_methods.items():
        searched |= {} if method in unused else ranges
    if loss in losses.pair_names():
        del searched["optimizer.proxy_learning_rate"]
    for path, found in overrides.items():
        group, _, name = path.partition(".")
        not_of_loss = group == "loss" and name not in config.loss
        if found is None or group in unused or not_of_loss:
            searched.pop(path, None)
        else:
            searched[path] = Range(*found)
    _check(config, searched)
    return searched


def _check(config: ConfigDict, space: Space) -> None:
    problems = []
    for path, bounds in space.items():
        if not bounds.low < bounds.high or (bounds.log and bounds.low <= 0):
            problems.append(f"{path}: {bounds} has no values")
            continue
        for end in (bounds.low, bounds.high):
            try:
                parse(with_settings(config, {path: int(end) if bounds.integer else float(end)}))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                problems.append(f"{path}={end:g}: {error}")
    if problems:
        raise UserError("the search space is impossible:\n  " + "\n  ".join(problems))


def with_settings(config: ConfigDict, settings: Mapping[str, object]) -> ConfigDict:
    """Returns a copy of a config with other settings, given by path."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(dict(settings))
    return changed
