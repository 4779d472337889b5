"""Losses that are a cross-entropy over classes, from plain softmax to Proxy-NCA."""

import dataclasses

import jax.numpy as jnp

from dml_jax._utils import numerics
from dml_jax.losses.base import (
    AnchorMask,
    AnchorTerms,
    ClassMask,
    Embeddings,
    Labels,
    Logits,
    Prepared,
    Proxies,
    ProxyLoss,
    RawProxies,
    RowLogits,
    RowMask,
    Scalar,
)
from dml_jax.settings import flag, number, setting


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss(ProxyLoss):
    """Cross-entropy over classes: the mean over rows of `log(sum_c exp(z_c)) - z_label`.

    With label smoothing s, a row's target is 1 - s for its label, and s is shared by the classes of
    its step, synthetic ones too: `log(sum_c exp(z_c)) - (1 - s) z_label - s mean_c z_c`.

    A subclass defines `logits`. It overrides `prepare` to change the normalisation, and `target`
    to add a margin.

    Source of label smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """

    label_smoothing: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Share of the target that all classes have in common.",
    )

    def target(self, logits: RowLogits, embeddings: Embeddings) -> RowLogits:
        """Returns the target logits with the margin applied; by default they are unchanged.

        Args:
            logits: each row's logit for its own label.
            embeddings: embeddings as `prepare` returns them, `[rows, dim]`.
        """
        del embeddings
        return logits

    def anchor_terms(
        self,
        embeddings: Embeddings,
        proxies: Proxies,
        labels: Labels,
        row_mask: RowMask,
        class_mask: ClassMask,
    ) -> tuple[AnchorTerms, AnchorTerms]:
        """Returns each row's log-sum-exp over classes and its target logit, with the margin.

        With label smoothing, the second is the mean of the logits under the smoothed target.
        """
        del row_mask
        logits = self.logits(embeddings, proxies)
        targets = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        targets = self.target(targets, embeddings)
        is_target = labels[:, None] == jnp.arange(logits.shape[1])[None]
        logits = jnp.where(is_target, targets[:, None], logits)
        log_sums = numerics.log_sum_exp(logits, axis=1, where=class_mask[None])
        if not self.label_smoothing:
            return log_sums, targets
        means = jnp.mean(logits, axis=1, where=class_mask[None])
        return log_sums, targets + self.label_smoothing * (means - targets)

    def mean(
        self, log_sums: AnchorTerms, positives: AnchorTerms, anchor_mask: AnchorMask
    ) -> Scalar:
        """Returns the mean cross-entropy."""
        return jnp.mean(log_sums - positives, where=anchor_mask)


@dataclasses.dataclass(frozen=True)
class Softmax(SoftmaxLoss):
    """Cross-entropy on `<x, w>` of raw vectors, with an optional bias for each class.

    With `bias`, proxies are `[classes, dim + 1]`, and their last column is the bias.
    """

    bias: bool = setting(False, flag(), help="Whether each class has a bias.")

    def proxy_shape(self, num_classes: int, dim: int) -> tuple[int, int]:
        """Returns `[classes, dim]`, with one more column for the bias."""
        return num_classes, dim + self.bias

    def prepare(self, embeddings: Embeddings, proxies: RawProxies) -> Prepared:
        """Returns the raw vectors in float32, embeddings with a column of ones for the bias."""
        embeddings, proxies = embeddings.astype(jnp.float32), proxies.astype(jnp.float32)
        if embeddings.shape[1] < proxies.shape[1]:
            embeddings = jnp.pad(embeddings, ((0, 0), (0, 1)), constant_values=1.0)
        return embeddings, proxies

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns the inner products."""
        return numerics.inner_products(embeddings, proxies)


@dataclasses.dataclass(frozen=True)
class VirtualSoftmax(SoftmaxLoss):
    """Softmax of raw vectors with a further class for each row, which has no members.

    Its proxy has the direction of the row's embedding and the length of the proxy of the row's
    label, so that its logit is the product of the two lengths.

    Source: Chen, Deng and Shen, Virtual class enhanced discriminative embedding learning, NeurIPS
    2018, equations 3 and 4.
    """

    def prepare(self, embeddings: Embeddings, proxies: RawProxies) -> Prepared:
        """Returns the raw vectors in float32."""
        return embeddings.astype(jnp.float32), proxies.astype(jnp.float32)

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns the inner products."""
        return numerics.inner_products(embeddings, proxies)

    def anchor_terms(
        self,
        embeddings: Embeddings,
        proxies: Proxies,
        labels: Labels,
        row_mask: RowMask,
        class_mask: ClassMask,
    ) -> tuple[AnchorTerms, AnchorTerms]:
        """Returns each row's log-sum-exp, over its virtual class too, and its target logit."""
        log_sums, targets = super().anchor_terms(embeddings, proxies, labels, row_mask, class_mask)
        virtual = numerics.lengths(embeddings) * numerics.lengths(proxies)[labels]
        return jnp.logaddexp(log_sums, virtual), targets


@dataclasses.dataclass(frozen=True)
class NormSoftmax(SoftmaxLoss):
    """Cross-entropy on `scale * <e, p>` of unit vectors.

    Source: Zhai and Wu, Classification is a strong baseline for deep metric learning, BMVC 2019.
    """

    scale: float = setting(23.0, number(above=0.0), help="Factor of the cosines.")

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns `scale` times the cosine similarities."""
        return self.scale * numerics.inner_products(embeddings, proxies)


@dataclasses.dataclass(frozen=True)
class ProxyNCA(SoftmaxLoss):
    """Cross-entropy on `-scale * |e - p|^2` of unit vectors.

    The positive proxy is part of the denominator.

    Source: Movshovitz-Attias et al., No fuss distance metric learning using proxies, ICCV 2017.
    """

    scale: float = setting(12.0, number(above=0.0), help="Factor of the squared distances.")

    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns `2 * scale * (<e, p> - 1)`, equal to `-scale * |e - p|^2` for unit vectors."""
        return 2 * self.scale * (numerics.inner_products(embeddings, proxies) - 1)
