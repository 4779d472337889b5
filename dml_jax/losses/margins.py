"""Softmax losses with a margin: CosFace, ArcFace, SphereFace."""

import dataclasses
import math

import jax.numpy as jnp

from dml_jax._utils import numerics
from dml_jax.losses.base import Embeddings, Prepared, RawProxies, RowLogits
from dml_jax.losses.softmax import NormSoftmax
from dml_jax.settings import number, setting

_MIN_SQUARED_SINE = 1e-7
"""Smaller squared sines are clipped, since the derivative of the angle is infinite at 0 and pi."""


@dataclasses.dataclass(frozen=True)
class CosFace(NormSoftmax):
    """Norm-SoftMax with `margin` subtracted from the target's cosine.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, CVPR 2018,
    equation 4.
    """

    scale: float = setting(64.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(0.35, number(least=0.0), help="Subtracted from the target's cosine.")

    def target(self, logits: RowLogits, embeddings: Embeddings) -> RowLogits:
        """Returns `scale * (cos - margin)`."""
        return logits - self.scale * self.margin


@dataclasses.dataclass(frozen=True)
class ArcFace(NormSoftmax):
    """Norm-SoftMax with `margin`, in radians, added to the target's angle.

    Where the angle with the margin would exceed pi, `margin * sin(margin)` is subtracted from the
    cosine instead, so that the target logit stays monotone in the angle.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, CVPR 2019,
    equation 3.
    """

    scale: float = setting(64.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(
        0.5,
        number(least=0.0, below=math.pi),
        help="Added to the target's angle, in radians.",
    )

    def target(self, logits: RowLogits, embeddings: Embeddings) -> RowLogits:
        """Returns `scale * cos(angle + margin)`."""
        cosine = logits / self.scale
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, _MIN_SQUARED_SINE))
        with_margin = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        fallback = cosine - self.margin * math.sin(self.margin)
        return self.scale * jnp.where(cosine >= -math.cos(self.margin), with_margin, fallback)


@dataclasses.dataclass(frozen=True)
class SphereFace(NormSoftmax):
    """Cross-entropy on `scale * |x| * cos`, with the target's angle multiplied by `margin`.

    `(-1)^k cos(margin * angle) - 2k` with `k = floor(margin * angle / pi)` is monotone in the
    angle. Proxies are unit vectors; embeddings are raw, also in Proxy Synthesis and MemVir.

    Source: Liu et al., SphereFace: Deep hypersphere embedding for face recognition, CVPR 2017,
    equation 7.
    """

    scale: float = setting(1.0, number(above=0.0), help="Factor of the logits.")
    margin: float = setting(4.0, number(least=1.0), help="Multiplies the target's angle.")

    def prepare(self, embeddings: Embeddings, proxies: RawProxies) -> Prepared:
        """Returns raw embeddings and unit proxies."""
        return embeddings.astype(jnp.float32), numerics.normalize(proxies)

    def target(self, logits: RowLogits, embeddings: Embeddings) -> RowLogits:
        """Returns `scale * |x| * ((-1)^k cos(margin * angle) - 2k)`."""
        length = self.scale * numerics.lengths(embeddings)
        cosine = logits / jnp.where(length > 0, length, 1.0)
        bound = 1 - _MIN_SQUARED_SINE / 2
        angle = self.margin * jnp.arccos(jnp.clip(cosine, -bound, bound))
        k = jnp.floor(angle / math.pi)
        return length * ((1 - 2 * (k % 2)) * jnp.cos(angle) - 2 * k)
