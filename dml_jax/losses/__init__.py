"""Proxy losses, which attract embeddings to their class's proxy and repel them from the others.

A proxy loss is a callable `loss(embeddings, proxies, labels) -> scalar` of raw (unnormalised)
vectors. Losses of pairs, `loss(embeddings, labels) -> scalar`, are here for comparison.

Losses of unit vectors, and their gradients, are finite for all finite inputs. The logits of
`softmax`, `virtual_softmax` and `sphereface` grow with the length of the embeddings: these are
finite for entries up to 1e30 (the first two with proxies of about 1), and their logits overflow
float32 beyond 1e37.
"""

from dml_jax.losses.base import Loss, PairLoss, ProxyLoss, of_proxies
from dml_jax.losses.margins import ArcFace, CosFace, SphereFace
from dml_jax.losses.pairs import Contrastive, MultiSimilarity, Triplet
from dml_jax.losses.proxy_anchor import ProxyAnchor
from dml_jax.losses.registry import LOSSES, create, names, pair_names, register
from dml_jax.losses.soft_triple import SoftTriple
from dml_jax.losses.softmax import NormSoftmax, ProxyNCA, Softmax, SoftmaxLoss, VirtualSoftmax

__all__ = [
    "LOSSES",
    "ArcFace",
    "Contrastive",
    "CosFace",
    "Loss",
    "MultiSimilarity",
    "NormSoftmax",
    "PairLoss",
    "ProxyAnchor",
    "ProxyLoss",
    "ProxyNCA",
    "SoftTriple",
    "Softmax",
    "SoftmaxLoss",
    "SphereFace",
    "Triplet",
    "VirtualSoftmax",
    "create",
    "names",
    "of_proxies",
    "pair_names",
    "register",
]
