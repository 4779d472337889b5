"""Proxy losses: how an embedding is pulled to its class's proxy and pushed from the others.

A loss is a callable `loss(embeddings, proxies, labels) -> scalar` of raw (unnormalised) vectors.
Adding one takes a class here, named in `_LOSSES`: Proxy Synthesis, MemVir and the train step
need of it only what `SoftmaxLoss` names.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax import numerics


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss(abc.ABC):
    """Cross-entropy over classes: the mean of `log(sum_c exp(z_c)) - z_label` over the rows.

    A subclass says how logits are formed, and overrides `prepare` or `target` where the
    vectors are not simply normalised or the label's own logit is made harder.
    """

    def prepare(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "proxies dim"]]:
        """What `logits` takes: by default both sets of vectors at unit length, in float32."""
        return numerics.normalize(embeddings), numerics.normalize(proxies)

    @abc.abstractmethod
    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """The logits of prepared embeddings against prepared proxies, without any margin."""

    def target(self, logit: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """What a row's logit for its own label becomes; unchanged by default."""
        return logit

    def __call__(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies dim"],
        labels: Int[Array, " rows"],
        *,
        row_mask: Bool[Array, " rows"] | None = None,
        class_mask: Bool[Array, " classes"] | None = None,
    ) -> Float[Array, ""]:
        """The mean loss of a batch.

        Args:
            embeddings: `[rows, dim]`, raw.
            proxies: `[classes, dim]`, raw, one a class.
            labels: `[rows]`, in `0..classes - 1`.
            row_mask: rows that count; None counts all.
            class_mask: classes that exist; None takes all.

        Returns:
            A float32 scalar.
        """
        logits = self.logits(*self.prepare(embeddings, proxies))
        log_sums, targets = row_terms(self, logits, labels, class_mask)
        return jnp.mean(log_sums - targets, where=row_mask)


def row_terms(
    loss: SoftmaxLoss,
    logits: Float[Array, "rows classes"],
    labels: Int[Array, " rows"],
    class_mask: Bool[Array, " classes"] | None = None,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """A row's log-sum-exp over classes and its own label's logit, both with the loss's margin.

    Their difference is the row's cross-entropy. MemVir keeps them apart to remember them.

    Args:
        loss: gives the margin.
        logits: `[rows, classes]`, without margin.
        labels: `[rows]`.
        class_mask: classes that exist; None takes all.

    Returns:
        `[rows]` and `[rows]`.
    """
    targets = loss.target(jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0])
    is_target = labels[:, None] == jnp.arange(logits.shape[1])[None, :]
    logits = jnp.where(is_target, targets[:, None], logits)
    where = None if class_mask is None else class_mask[None, :]
    return jax.nn.logsumexp(logits, axis=1, where=where), targets


@dataclasses.dataclass(frozen=True)
class NormSoftmax(SoftmaxLoss):
    """Cross-entropy on `scale * <e, p>` of unit vectors.

    Source: Zhai and Wu, Classification is a strong baseline for deep metric learning, BMVC 2019.
    """

    scale: float = 23.0

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

    scale: float = 12.0

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """`2 * scale * (<e, p> - 1)`, which is `-scale * |e - p|^2` for unit vectors."""
        return 2 * self.scale * (numerics.inner_products(embeddings, proxies) - 1)


_LOSSES: dict[str, type[SoftmaxLoss]] = {
    "norm_softmax": NormSoftmax,
    "proxy_nca": ProxyNCA,
}
NAMES = tuple(_LOSSES)


def create(name: str, **hyperparameters: Any) -> SoftmaxLoss:
    """Makes a loss by name.

    >>> create("norm_softmax", scale=16.0)
    NormSoftmax(scale=16.0)

    Args:
        name: one of `norm_softmax`, `proxy_nca`.
        **hyperparameters: the loss's own, each with the papers' CARS196 setting as default.

    Returns:
        A callable `loss(embeddings, proxies, labels) -> scalar`.

    Raises:
        ValueError: unknown name or hyper-parameter.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(sorted(_LOSSES))}")
    known = {field.name for field in dataclasses.fields(_LOSSES[name])}
    if unknown := sorted(hyperparameters.keys() - known):
        raise ValueError(
            f"loss {name!r} has no hyper-parameter {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known)) or 'none'}"
        )
    return _LOSSES[name](**hyperparameters)
