"""Proxy losses, which attract embeddings to their class's proxy and repel them from the others.

A loss is a callable `loss(embeddings, proxies, labels) -> scalar` of raw (unnormalised) vectors.

Losses of unit vectors, and their gradients, are finite for all finite inputs. The logits of
`softmax` and `sphereface` grow with the length of the embeddings: these two are finite for entries
up to 1e30 (`softmax` with proxies of about 1), and their logits overflow float32 beyond 1e37.
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
