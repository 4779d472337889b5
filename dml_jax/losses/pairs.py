"""Losses of pairs of samples: contrastive, Multi-Similarity and batch-hard triplets."""

import dataclasses

import jax
import jax.numpy as jnp

from dml_jax._utils import numerics
from dml_jax.losses.base import PairLoss, PairMask, RowLogits, Similarities
from dml_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class Contrastive(PairLoss):
    """Sum over positives of `1 - cos`, plus the sum over negatives of `max(cos - margin, 0)`.

    The official code adds the cosine of each negative above the margin itself. The gradient is the
    same, but that loss is not continuous.

    Source: Wang et al., Cross-batch memory for embedding learning, CVPR 2020, equation 2.
    """

    margin: float = setting(
        0.5, number(least=-1.0, most=1.0), help="Cosine above which negatives are pushed."
    )

    def of_rows(
        self, similarities: Similarities, positive: PairMask, negative: PairMask
    ) -> RowLogits:
        """Returns the sums over each row's pairs."""
        pull = jnp.sum(1 - similarities, axis=1, where=positive)
        return pull + jnp.sum(jax.nn.relu(similarities - self.margin), axis=1, where=negative)


@dataclasses.dataclass(frozen=True)
class MultiSimilarity(PairLoss):
    """Soft weighting of the pairs that are hard for their row.

    A negative counts if its cosine plus `margin` is above that of the row's farthest positive, and
    a positive if its cosine minus `margin` is below that of the nearest negative. The loss of a row
    that has both is `log(1 + sum_positive exp(-scale_pos * (cos - threshold))) / scale_pos`, plus
    `log(1 + sum_negative exp(scale_neg * (cos - threshold))) / scale_neg`. That of others is 0.

    Source: Wang et al., Multi-similarity loss with general pair weighting for deep metric learning,
    CVPR 2019, equations 10, 11 and 14, with the margin and the threshold of the official code.
    """

    scale_pos: float = setting(2.0, number(above=0.0), help="Factor for positives, alpha.")
    scale_neg: float = setting(40.0, number(above=0.0), help="Factor for negatives, beta.")
    threshold: float = setting(
        0.5, number(least=-1.0, most=1.0), help="Cosine that the factors are relative to, lambda."
    )
    margin: float = setting(0.1, number(least=0.0), help="Margin of the choice of pairs, epsilon.")

    def of_rows(
        self, similarities: Similarities, positive: PairMask, negative: PairMask
    ) -> RowLogits:
        """Returns the weighted sums over the hard pairs of each row."""
        farthest = jnp.min(similarities, axis=1, keepdims=True, initial=jnp.inf, where=positive)
        nearest = jnp.max(similarities, axis=1, keepdims=True, initial=-jnp.inf, where=negative)
        # Negated, so that NaN propagates.
        hard_negative = negative & ~(similarities + self.margin <= farthest)
        hard_positive = positive & ~(similarities - self.margin >= nearest)
        relative = similarities - self.threshold
        pull = numerics.log_sum_exp(-self.scale_pos * relative, axis=1, where=hard_positive)
        push = numerics.log_sum_exp(self.scale_neg * relative, axis=1, where=hard_negative)
        of_row = (
            numerics.log_one_plus_exp(pull) / self.scale_pos
            + numerics.log_one_plus_exp(push) / self.scale_neg
        )
        has_both = hard_positive.any(axis=1) & hard_negative.any(axis=1)
        return jnp.where(has_both, of_row, 0.0)


@dataclasses.dataclass(frozen=True)
class Triplet(PairLoss):
    """Batch-hard triplets: each row with its farthest positive and its nearest negative.

    The loss of a row is `max(margin + far - near, 0)` of the Euclidean distances between unit
    vectors, or, without a margin, `log(1 + exp(far - near))`. That of a row without both is 0, and
    the mean is over the rows that have both.

    Source: Hermans, Beyer and Leibe, In defense of the triplet loss for person re-identification,
    arXiv 1703.07737, equation 5 and section 2.3, there with distances of raw vectors.
    """

    margin: float = setting(
        0.0, number(least=0.0), help="Margin of the distances; 0 for the soft margin."
    )

    def of_rows(
        self, similarities: Similarities, positive: PairMask, negative: PairMask
    ) -> RowLogits:
        """Returns the loss of each row, scaled so that its mean is that of the rows with both."""
        farthest = jnp.min(similarities, axis=1, initial=2.0, where=positive)
        nearest = jnp.max(similarities, axis=1, initial=-2.0, where=negative)
        difference = _distances(farthest) - _distances(nearest)
        if self.margin:
            of_row = jax.nn.relu(self.margin + difference)
        else:
            of_row = jax.nn.softplus(difference)
        has_both = positive.any(axis=1) & negative.any(axis=1)
        share = jnp.maximum(jnp.mean(has_both.astype(jnp.float32)), 1 / has_both.shape[0])
        return jnp.where(has_both, of_row, 0.0) / share


def _distances(cosines: RowLogits) -> RowLogits:
    """Returns the distances of unit vectors with some cosines; the gradient at 0 is finite."""
    return jnp.sqrt(jnp.maximum(2 - 2 * cosines, 1e-12))
