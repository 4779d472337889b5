"""Softmax losses with a margin: CosFace, ArcFace, SphereFace."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from dml_jax._utils import numerics
from dml_jax.losses.softmax import NormSoftmax
from dml_jax.settings import number, setting

_LEAST_SQUARED_SINE = 1e-7
"""Below it an angle's slope by its cosine, which is infinite at 0 and pi, is taken for zero."""


@dataclasses.dataclass(frozen=True)
class CosFace(NormSoftmax):
    """Norm-SoftMax with the target's cosine lowered by `margin`.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, CVPR 2018,
    equation 4.
    """

    scale: float = setting(64.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(0.35, number(least=0.0), help="Lowers the cosine with the own proxy.")

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * (cos - margin)`."""
        return logits - self.scale * self.margin


@dataclasses.dataclass(frozen=True)
class ArcFace(NormSoftmax):
    """Norm-SoftMax with the target's angle raised by `margin` radians.

    Where the raised angle would pass pi, the cosine is lowered by `margin * sin(margin)` instead,
    so that the loss keeps falling with the angle.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, CVPR 2019,
    equation 3.
    """

    scale: float = setting(64.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(
        0.5,
        number(least=0.0, below=math.pi),
        help="Raises the angle to the own proxy, in radians.",
    )

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * cos(angle + margin)`."""
        cosine = logits / self.scale
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, _LEAST_SQUARED_SINE))
        raised = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        lowered = cosine - self.margin * math.sin(self.margin)
        return self.scale * jnp.where(cosine >= -math.cos(self.margin), raised, lowered)


@dataclasses.dataclass(frozen=True)
class SphereFace(NormSoftmax):
    """Cross-entropy on `scale * |x| * cos`, the target's angle multiplied by `margin`.

    `(-1)^k cos(margin * angle) - 2k` with `k = floor(margin * angle / pi)` makes the multiplied
    angle's cosine fall all the way. Proxies are unit vectors, embeddings keep their length: it is
    mixed and remembered with them.

    Source: Liu et al., SphereFace: Deep hypersphere embedding for face recognition, CVPR 2017,
    equation 7.
    """

    scale: float = setting(1.0, number(above=0.0), help="Factor of the logits.")
    margin: float = setting(4.0, number(least=1.0), help="Multiplies the angle to the own proxy.")

    def prepare(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies pdim"]
    ) -> tuple[Float[Array, "rows pdim"], Float[Array, "proxies pdim"]]:
        """Raw embeddings, unit proxies."""
        return embeddings.astype(jnp.float32), numerics.normalize(proxies)

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * |x| * ((-1)^k cos(margin * angle) - 2k)`."""
        length = self.scale * numerics.lengths(embeddings)
        cosine = logits / jnp.where(length > 0, length, 1.0)
        bound = 1 - _LEAST_SQUARED_SINE / 2
        angle = self.margin * jnp.arccos(jnp.clip(cosine, -bound, bound))
        turns = jnp.floor(angle / math.pi)
        return length * ((1 - 2 * (turns % 2)) * jnp.cos(angle) - 2 * turns)
