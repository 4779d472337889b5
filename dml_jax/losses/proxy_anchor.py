"""Proxy-Anchor: a loss whose anchors are the classes."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dml_jax._utils import numerics
from dml_jax.losses.base import (
    AnchorMask,
    AnchorTerms,
    ClassMask,
    Embeddings,
    Labels,
    Logits,
    Proxies,
    ProxyLoss,
    RowMask,
    Scalar,
)
from dml_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class ProxyAnchor(ProxyLoss):
    """Pulls each proxy's positive embeddings and pushes its negative ones.

    The mean over proxies with a positive of `log(1 + sum_positive exp(-alpha * (cos - margin)))`,
    plus the mean over all proxies of `log(1 + sum_negative exp(alpha * (cos + margin)))`.

    Source: Kim et al., Proxy anchor loss for deep metric learning, CVPR 2020, equation 4.
    """

    alpha: float = setting(32.0, number(above=0.0), help="Factor of the cosines.")
    margin: float = setting(0.1, number(least=0.0), help="Margin of the cosines, delta.")

    class_anchors: ClassVar[bool] = True

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns the logits of negatives, `alpha * (cos + margin)`."""
        return self.alpha * (numerics.inner_products(embeddings, proxies) + self.margin)

    def anchor_terms(
        self,
        embeddings: Embeddings,
        proxies: Proxies,
        labels: Labels,
        row_mask: RowMask,
        class_mask: ClassMask,
    ) -> tuple[AnchorTerms, AnchorTerms]:
        """Returns each proxy's log-sum-exps over negatives and over positives; -inf for none."""
        logits = self.logits(embeddings, proxies)
        positive = labels[:, None] == jnp.arange(len(class_mask))[None]
        rows = row_mask[:, None]
        negatives = numerics.log_sum_exp(logits, axis=0, where=rows & ~positive)
        # The logits of positives, -alpha * (cos - margin), from those of negatives:
        positive_logits = 2 * self.alpha * self.margin - logits
        return negatives, numerics.log_sum_exp(positive_logits, axis=0, where=rows & positive)

    def mean(
        self, log_sums: AnchorTerms, positives: AnchorTerms, anchor_mask: AnchorMask
    ) -> Scalar:
        """Returns the positive term's mean plus the negative term's mean."""
        with_positives = anchor_mask & (positives != -jnp.inf)
        positive_term = jnp.sum(numerics.log_one_plus_exp(positives), where=with_positives)
        positive_term /= jnp.maximum(jnp.sum(with_positives), 1).astype(jnp.float32)
        return positive_term + jnp.mean(numerics.log_one_plus_exp(log_sums), where=anchor_mask)
