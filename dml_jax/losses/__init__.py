"""Proxy losses: how an embedding is pulled to its class's proxy and pushed from the others.

A loss is a callable `loss(embeddings, proxies, labels) -> scalar` of raw (unnormalised) vectors.
Losses of unit vectors are finite, with finite gradients, for all finite vectors. Those whose logits
grow with the embedding's length, `softmax` and `sphereface`, are so for entries up to 1e30
(`softmax` beside proxies of about 1); beyond 1e37 their logits overflow float32.
"""

from dml_jax.losses.base import ProxyLoss
from dml_jax.losses.margins import ArcFace, CosFace, SphereFace
from dml_jax.losses.proxy_anchor import ProxyAnchor
from dml_jax.losses.registry import LOSSES, create, names, register
from dml_jax.losses.soft_triple import SoftTriple
from dml_jax.losses.softmax import NormSoftmax, ProxyNCA, Softmax, SoftmaxLoss

__all__ = [
    "LOSSES",
    "ArcFace",
    "CosFace",
    "NormSoftmax",
    "ProxyAnchor",
    "ProxyLoss",
    "ProxyNCA",
    "SoftTriple",
    "Softmax",
    "SoftmaxLoss",
    "SphereFace",
    "create",
    "names",
    "register",
]
