"""SoftTriple: a softmax loss with several centres per class."""

import dataclasses

import jax
import jax.numpy as jnp

from dml_jax._utils import numerics
from dml_jax.losses.base import ClassMask, Embeddings, Logits, Proxies, RowLogits, Scalar
from dml_jax.losses.softmax import SoftmaxLoss
from dml_jax.settings import integer, number, setting


@dataclasses.dataclass(frozen=True)
class SoftTriple(SoftmaxLoss):
    """Cross-entropy on `la * (similarity - margin at the target)`, with several centres per class.

    The similarity to a class is the mean of the cosines to its centres, weighted by the softmax of
    `cosine / gamma`. Proxies are `[classes * centers_per_class, dim]`, class-major.

    `tau` weights the regulariser of equation 9, which merges centres that a class does not need:
    half the mean distance between two centres of a class. This is the authors' implementation,
    which divides the sum over unordered pairs by the number of ordered ones. It includes the
    synthetic classes of Proxy Synthesis, but not the virtual classes of MemVir.

    Source: Qian et al., SoftTriple loss: Deep metric learning without triplet sampling, ICCV 2019,
    equations 7 to 9.
    """

    la: float = setting(20.0, number(above=0.0), help="Factor of the similarities, lambda.")
    gamma: float = setting(
        0.1, number(above=0.0), help="Temperature of the softmax over the centres of a class."
    )
    margin: float = setting(
        0.01, number(least=0.0), help="Subtracted from the target's similarity, delta."
    )
    tau: float = setting(0.0, number(least=0.0), help="Weight of the regulariser.")
    centers_per_class: int = setting(10, integer(1), help="Centres of each class, K.")

    @property
    def proxies_per_class(self) -> int:
        """Number of centres of each class."""
        return self.centers_per_class

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns `la` times the similarities."""
        cosines = numerics.inner_products(embeddings, proxies)
        cosines = cosines.reshape(len(embeddings), -1, self.centers_per_class)
        return self.la * jnp.sum(jax.nn.softmax(cosines / self.gamma) * cosines, axis=-1)

    def target(self, logits: RowLogits, embeddings: Embeddings) -> RowLogits:
        """Returns `la * (similarity - margin)`."""
        return logits - self.la * self.margin

    def penalty(self, proxies: Proxies, class_mask: ClassMask) -> Scalar:
        """Returns `tau` times half the mean distance between two centres of a class."""
        if self.tau == 0 or self.centers_per_class == 1:
            return jnp.zeros(())
        centers = proxies.reshape(-1, self.centers_per_class, proxies.shape[-1])
        first, second = jnp.triu_indices(self.centers_per_class, k=1)
        distances = numerics.lengths(centers[:, first] - centers[:, second])
        return self.tau / 2 * jnp.mean(jnp.mean(distances, axis=1), where=class_mask)
