"""Mixup and manifold mixup: training on mixtures of two images, or of their features.

Sources: Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018; Verma et al., Manifold
mixup: Better representations by interpolating hidden states, ICML 2019.

Each sample is mixed with the one half a batch further on, in random batches a random one. On
several devices that is a transfer of each sample to one other device. All samples of a step have
one weight, and the loss of the mixtures is the equally weighted mean of the losses with both
labels.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dml_jax._utils import numerics
from dml_jax.losses.base import Labels, Scalar
from dml_jax.settings import integer, number, setting


@dataclasses.dataclass(frozen=True)
class MixupConfig:
    """The settings of mixup."""

    alpha: float = setting(
        0.0,
        number(least=0.0),
        help="Mixing weights are drawn from Beta(alpha, alpha); 0 disables mixup.",
    )
    depth: int = setting(
        0,
        integer(0),
        help="In each step the samples are mixed at one of the first depth + 1 places, drawn at "
        "random: the inputs of each part of the network that trains, which are the images first, "
        "unless a part is frozen, and the pooled features last.",
    )


class Mixture(NamedTuple):
    """How the samples of a step are mixed."""

    weight: Float[Array, ""]
    """Weight of each sample against its partner."""
    depth: Int[Array, ""]
    """The place, counted from the images."""

    def at(self, depth: int, x: Float[Array, "batch *features"]) -> Float[Array, "batch *features"]:
        """Returns the inputs of a place, mixed if it is the drawn one.

        Args:
            depth: the place, counted from the images.
            x: images or features of a batch, or of a micro-batch.
        """
        weight = jnp.where(self.depth == depth, self.weight, 1.0).astype(x.dtype)
        return weight * x + (1 - weight) * jnp.roll(x, -(x.shape[0] // 2), axis=0)

    def loss(
        self, of_labels: Callable[[Labels], Scalar], labels: Labels, *, micro_batches: int
    ) -> Scalar:
        """Returns the weighted mean of the losses with the labels and with those of the partners.

        Args:
            of_labels: returns the loss of the mixtures with some labels.
            labels: `[batch]`.
            micro_batches: number of micro-batches that are mixed separately. Each is every
                `micro_batches`-th sample of the batch.
        """
        half = labels.shape[0] // micro_batches // 2
        of_partners = jnp.roll(labels, -half * micro_batches)
        return self.weight * of_labels(labels) + (1 - self.weight) * of_labels(of_partners)


def draw(key: PRNGKeyArray, config: MixupConfig) -> Mixture:
    """Returns the mixture of a step.

    Args:
        key: a random key.
        config: the settings.
    """
    weight_key, depth_key = jax.random.split(key)
    return Mixture(
        weight=numerics.draw_beta(weight_key, config.alpha, ()),
        depth=jax.random.randint(depth_key, (), 0, config.depth + 1),
    )
