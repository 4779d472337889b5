"""Losses by name."""

import dataclasses
from typing import Any

from dml_jax._utils.errors import UserError
from dml_jax._utils.registry import Registry
from dml_jax.losses.base import Loss, PairLoss, ProxyLoss
from dml_jax.losses.margins import ArcFace, CosFace, SphereFace
from dml_jax.losses.pairs import Contrastive, MultiSimilarity, Triplet
from dml_jax.losses.proxy_anchor import ProxyAnchor
from dml_jax.losses.soft_triple import SoftTriple
from dml_jax.losses.softmax import NormSoftmax, ProxyNCA, Softmax, VirtualSoftmax

LOSSES: Registry[type[Loss]] = Registry("loss", Loss)
"""Loss classes by name. `register` adds one, also from outside the package."""

register = LOSSES.register

_BUILT_IN: dict[str, type[Loss]] = {
    "softmax": Softmax,
    "virtual_softmax": VirtualSoftmax,
    "norm_softmax": NormSoftmax,
    "proxy_nca": ProxyNCA,
    "cosface": CosFace,
    "arcface": ArcFace,
    "sphereface": SphereFace,
    "soft_triple": SoftTriple,
    "proxy_anchor": ProxyAnchor,
    "contrastive": Contrastive,
    "multi_similarity": MultiSimilarity,
    "triplet": Triplet,
}
for _name, _loss in _BUILT_IN.items():
    register(_name)(_loss)


def names() -> tuple[str, ...]:
    """Returns the names of the proxy losses."""
    return tuple(name for name in LOSSES.names() if issubclass(LOSSES.get(name), ProxyLoss))


def pair_names() -> tuple[str, ...]:
    """Returns the names of the losses of pairs."""
    return tuple(name for name in LOSSES.names() if issubclass(LOSSES.get(name), PairLoss))


def create(name: str, **hyperparameters: Any) -> Any:
    """Returns the loss of a name.

    >>> create("norm_softmax", scale=16.0)
    NormSoftmax(label_smoothing=0.0, scale=16.0)

    Args:
        name: one of `names()` or `pair_names()`, or the import path of another loss.
        **hyperparameters: fields of the loss's class; all have defaults. A list stands for a
            tuple, since JSON has no tuples.

    Returns:
        A `ProxyLoss`, a callable `loss(embeddings, proxies, labels) -> scalar`, or a `PairLoss`,
        a callable `loss(embeddings, labels) -> scalar`.

    Raises:
        ValueError: the name or a hyper-parameter is unknown.
    """
    loss = LOSSES.get(name)
    known = {field.name for field in dataclasses.fields(loss)}
    if unknown := sorted(hyperparameters.keys() - known):
        raise UserError(
            f"loss {name!r} has no hyper-parameter {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known)) or 'none'}"
        )
    fields = {k: tuple(x) if isinstance(x, list) else x for k, x in hyperparameters.items()}
    return loss(**fields)
