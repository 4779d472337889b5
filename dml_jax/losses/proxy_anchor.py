"""Proxy-Anchor: a loss whose units are the proxies."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax._utils import numerics
from dml_jax.losses.base import ProxyLoss
from dml_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class ProxyAnchor(ProxyLoss):
    """For each proxy, the embeddings that are too far from it and those that are too near.

    The mean over proxies with a positive of `log(1 + sum_positive exp(-alpha * (cos - margin)))`,
    and over all proxies of `log(1 + sum_negative exp(alpha * (cos + margin)))`.

    Source: Kim et al., Proxy anchor loss for deep metric learning, CVPR 2020, equation 4.
    """

    alpha: float = setting(32.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(0.1, number(least=0.0), help="Margin of the cosines, delta.")

    per_class: ClassVar[bool] = True

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """`alpha * (cos + margin)`, as a negative has it."""
        return self.alpha * (numerics.inner_products(embeddings, proxies) + self.margin)

    def within(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies dim"],
        labels: Int[Array, " rows"],
        row_mask: Bool[Array, " rows"],
        class_mask: Bool[Array, " classes"],
    ) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Each proxy's log-sum-exp over its negatives, and over its positives: -inf for none."""
        logits = self.logits(embeddings, proxies)
        positive = labels[:, None] == jnp.arange(len(class_mask))[None]
        rows = row_mask[:, None]
        negatives = numerics.log_sum_exp(logits, axis=0, where=rows & ~positive)
        # alpha * (cos + margin) is the logit, so -alpha * (cos - margin) is this:
        pull = 2 * self.alpha * self.margin - logits
        return negatives, numerics.log_sum_exp(pull, axis=0, where=rows & positive)

    def mean(
        self,
        sums: Float[Array, " units"],
        own: Float[Array, " units"],
        counts: Bool[Array, " units"],
    ) -> Float[Array, ""]:
        """The mean over proxies with positives and the mean over all proxies."""
        with_positives = counts & (own != -jnp.inf)
        pulled = jnp.sum(_log_one_plus_exp(own), where=with_positives)
        pulled /= jnp.maximum(jnp.sum(with_positives), 1).astype(jnp.float32)
        return pulled + jnp.mean(_log_one_plus_exp(sums), where=counts)


def _log_one_plus_exp(x: Float[Array, " units"]) -> Float[Array, " units"]:
    """`log(1 + exp(x))`; 0, without a gradient, at -inf."""
    some = x != -jnp.inf
    return jnp.where(some, jax.nn.softplus(jnp.where(some, x, 0.0)), 0.0)
