"""Losses by name."""

import dataclasses
from typing import Any

from dml_jax._utils.errors import UserError
from dml_jax._utils.registry import Registry
from dml_jax.losses.base import ProxyLoss
from dml_jax.losses.margins import ArcFace, CosFace, SphereFace
from dml_jax.losses.proxy_anchor import ProxyAnchor
from dml_jax.losses.soft_triple import SoftTriple
from dml_jax.losses.softmax import NormSoftmax, ProxyNCA, Softmax

LOSSES: Registry[type[ProxyLoss]] = Registry("loss", ProxyLoss)
"""Loss classes by name. `register` adds one, also from outside the package."""

register = LOSSES.register
names = LOSSES.names

_BUILT_IN: dict[str, type[ProxyLoss]] = {
    "softmax": Softmax,
    "norm_softmax": NormSoftmax,
    "proxy_nca": ProxyNCA,
    "cosface": CosFace,
    "arcface": ArcFace,
    "sphereface": SphereFace,
    "soft_triple": SoftTriple,
    "proxy_anchor": ProxyAnchor,
}
for _name, _loss in _BUILT_IN.items():
    register(_name)(_loss)


def create(name: str, **hyperparameters: Any) -> ProxyLoss:
    """Returns the loss of a name.

    >>> create("norm_softmax", scale=16.0)
    NormSoftmax(label_smoothing=0.0, scale=16.0)

    Args:
        name: one of `names()`, or the import path of another loss.
        **hyperparameters: fields of the loss's class; all have defaults. A list stands for a
            tuple, since JSON has no tuples.

    Returns:
        A callable `loss(embeddings, proxies, labels) -> scalar`.

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
