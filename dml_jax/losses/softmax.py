"""Losses that are a cross-entropy over classes: softmax, Norm-SoftMax, Proxy-NCA."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax._utils import numerics
from dml_jax.losses.base import ProxyLoss
from dml_jax.settings import flag, number, setting


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss(ProxyLoss):
    """Cross-entropy over classes: the mean of `log(sum_c exp(z_c)) - z_label` over the rows.

    A subclass says how logits are formed, and overrides `prepare` or `target` where the
    vectors are not simply normalised or the label's own logit is made harder.
    """

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """What the rows' logits for their own labels become; unchanged by default."""
        del embeddings
        return logits

    def within(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies dim"],
        labels: Int[Array, " rows"],
        row_mask: Bool[Array, " rows"],
        class_mask: Bool[Array, " classes"],
    ) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Each row's log-sum-exp over classes, and its own label's logit, both with the margin."""
        del row_mask
        logits = self.logits(embeddings, proxies)
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        own = self.target(own, embeddings)
        is_own = labels[:, None] == jnp.arange(logits.shape[1])[None]
        logits = jnp.where(is_own, own[:, None], logits)
        return numerics.log_sum_exp(logits, axis=1, where=class_mask[None]), own

    def mean(
        self,
        sums: Float[Array, " units"],
        own: Float[Array, " units"],
        counts: Bool[Array, " units"],
    ) -> Float[Array, ""]:
        """The mean cross-entropy."""
        return jnp.mean(sums - own, where=counts)


@dataclasses.dataclass(frozen=True)
class Softmax(SoftmaxLoss):
    """Cross-entropy on `<x, w>` of raw vectors, with a bias for each class if it is asked for.

    With `bias`, proxies are `[classes, dim + 1]`, and their last column is the bias.
    """

    bias: bool = setting(False, flag(), help="Whether each class has a bias.")

    def proxy_shape(self, num_classes: int, dim: int) -> tuple[int, int]:
        """A column more with a bias."""
        return num_classes, dim + self.bias

    def prepare(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies pdim"]
    ) -> tuple[Float[Array, "rows pdim"], Float[Array, "proxies pdim"]]:
        """The raw vectors, in float32; embeddings get a one that meets the bias."""
        embeddings, proxies = embeddings.astype(jnp.float32), proxies.astype(jnp.float32)
        if embeddings.shape[1] < proxies.shape[1]:
            embeddings = jnp.pad(embeddings, ((0, 0), (0, 1)), constant_values=1.0)
        return embeddings, proxies

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """The inner products."""
        return numerics.inner_products(embeddings, proxies)


@dataclasses.dataclass(frozen=True)
class NormSoftmax(SoftmaxLoss):
    """Cross-entropy on `scale * <e, p>` of unit vectors.

    Source: Zhai and Wu, Classification is a strong baseline for deep metric learning, BMVC 2019.
    """

    scale: float = setting(23.0, number(above=0.0), help="Factor of the cosines.")

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """`scale` times the cosine."""
        return self.scale * numerics.inner_products(embeddings, proxies)


@dataclasses.dataclass(frozen=True)
class ProxyNCA(SoftmaxLoss):
    """Cross-entropy on `-scale * |e - p|^2` of unit vectors, the own proxy in the denominator.

    Source: Movshovitz-Attias et al., No fuss distance metric learning using proxies, ICCV 2017.
    """

    scale: float = setting(12.0, number(above=0.0), help="Factor of the squared distances.")

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """`2 * scale * (<e, p> - 1)`, which is `-scale * |e - p|^2` for unit vectors."""
        return 2 * self.scale * (numerics.inner_products(embeddings, proxies) - 1)
