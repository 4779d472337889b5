"""The interfaces of losses of proxies, as Proxy Synthesis and MemVir use them, and of pairs."""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax._utils import numerics
from dml_jax._utils.errors import UserError

Scalar = Float[Array, ""]
Embeddings = Float[Array, "rows dim"]
Proxies = Float[Array, "proxies dim"]
Logits = Float[Array, "rows classes"]
Similarities = Float[Array, "rows candidates"]
PairMask = Bool[Array, "rows candidates"]
Labels = Int[Array, " rows"]
RowMask = Bool[Array, " rows"]
ClassMask = Bool[Array, " classes"]

RawProxies = Float[Array, "proxies pdim"]
"""Proxies before `ProxyLoss.prepare`; they may have a column more than the embeddings."""
Prepared = tuple[Float[Array, "rows pdim"], Float[Array, "proxies pdim"]]
"""Prepared embeddings and proxies."""

RowLogits = Float[Array, " rows"]
AnchorTerms = Float[Array, " anchors"]
AnchorMask = Bool[Array, " anchors"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """Base class of all losses: a `ProxyLoss` or a `PairLoss`."""

    def proxy_shape(self, num_classes: int, dim: int) -> tuple[int, int] | None:
        """Returns the shape of the proxies for embeddings of size `dim`; None without proxies."""
        del num_classes, dim
        return None


@dataclasses.dataclass(frozen=True)
class ProxyLoss(Loss, abc.ABC):
    """Base class of losses that are a mean over anchors of a function of a log-sum-exp.

    In a softmax loss each row of the batch is an anchor, and its log-sum-exp is over classes. In
    Proxy-Anchor each class is an anchor, and its log-sum-exp is over rows. MemVir computes these
    log-sum-exps in parts, from `logits`.
    """

    class_anchors: ClassVar[bool] = False
    """Whether the anchors are the classes rather than the rows."""

    def proxy_shape(self, num_classes: int, dim: int) -> tuple[int, int]:
        """Returns the shape of the proxies for embeddings of size `dim`."""
        return num_classes * self.proxies_per_class, dim

    @property
    def proxies_per_class(self) -> int:
        """Number of proxies of each class. They are consecutive rows of the proxies."""
        return 1

    def prepare(self, embeddings: Embeddings, proxies: RawProxies) -> Prepared:
        """Returns the float32 vectors that logits are computed from; by default unit vectors.

        Proxy Synthesis mixes these vectors, and MemVir stores them.
        """
        return numerics.normalize(embeddings), numerics.normalize(proxies)

    @abc.abstractmethod
    def logits(self, embeddings: Embeddings, proxies: Proxies) -> Logits:
        """Returns the logits, without a margin, of prepared embeddings and proxies.

        A logit must depend on its own row and on the proxies of its own class alone.
        """

    @abc.abstractmethod
    def anchor_terms(
        self,
        embeddings: Embeddings,
        proxies: Proxies,
        labels: Labels,
        row_mask: RowMask,
        class_mask: ClassMask,
    ) -> tuple[AnchorTerms, AnchorTerms]:
        """Returns the log-sum-exp and the positive term of each anchor.

        The positive term is the part of an anchor's loss that depends only on logits between rows
        and proxies of the anchor's own class; `mean` combines the two. If the anchors are classes,
        both are log-sum-exps over rows, -inf for no row. Embeddings and proxies are prepared
        vectors.
        """

    @abc.abstractmethod
    def mean(
        self, log_sums: AnchorTerms, positives: AnchorTerms, anchor_mask: AnchorMask
    ) -> Scalar:
        """Returns the mean loss of anchors.

        Args:
            log_sums: log-sum-exp of each anchor, over this step and the memory.
            positives: positive term of each anchor, as `anchor_terms` returns it.
            anchor_mask: anchors to include.
        """

    def penalty(self, proxies: Proxies, class_mask: ClassMask) -> Scalar:
        """Returns a regulariser of the prepared proxies, added to the loss; 0 by default."""
        del proxies, class_mask
        return jnp.zeros(())

    def __call__(
        self,
        embeddings: Embeddings,
        proxies: RawProxies,
        labels: Labels,
        *,
        row_mask: RowMask | None = None,
        class_mask: ClassMask | None = None,
    ) -> Scalar:
        """Returns the mean loss of a batch.

        Args:
            embeddings: `[rows, dim]`, raw.
            proxies: raw, `[classes, dim]` or the shape that `proxy_shape` returns.
            labels: `[rows]`, in `0..classes - 1`.
            row_mask: rows to include; None includes all.
            class_mask: classes to include; None includes all.

        Returns:
            A float32 scalar.
        """
        embeddings, proxies = self.prepare(embeddings, proxies)
        row_mask, class_mask = self.fill_masks(embeddings, proxies, row_mask, class_mask)
        log_sums, positives = self.anchor_terms(embeddings, proxies, labels, row_mask, class_mask)
        anchor_mask = class_mask if self.class_anchors else row_mask
        return self.mean(log_sums, positives, anchor_mask) + self.penalty(proxies, class_mask)

    def fill_masks(
        self,
        embeddings: Embeddings,
        proxies: Proxies,
        row_mask: RowMask | None,
        class_mask: ClassMask | None,
    ) -> tuple[RowMask, ClassMask]:
        """Returns the masks, with None replaced by a mask that includes all."""
        if row_mask is None:
            row_mask = jnp.ones(len(embeddings), bool)
        if class_mask is None:
            class_mask = jnp.ones(len(proxies) // self.proxies_per_class, bool)
        return row_mask, class_mask


@dataclasses.dataclass(frozen=True)
class PairLoss(Loss, abc.ABC):
    """Base class of losses of pairs: the mean over rows of a function of their cosines.

    The rows of a batch are compared with candidates: the rows themselves, or those of the batches
    in a memory (`dml_jax.xbm`).
    """

    @abc.abstractmethod
    def of_rows(
        self, similarities: Similarities, positive: PairMask, negative: PairMask
    ) -> RowLogits:
        """Returns the loss of each row.

        Args:
            similarities: the cosine of each row with each candidate.
            positive: pairs of one class, without those of a sample and itself.
            negative: pairs of different classes.
        """

    def __call__(
        self,
        embeddings: Embeddings,
        labels: Labels,
        *,
        candidates: Float[Array, "candidates dim"] | None = None,
        candidate_labels: Int[Array, " candidates"] | None = None,
        candidate_mask: Bool[Array, " candidates"] | None = None,
    ) -> Scalar:
        """Returns the mean loss of a batch.

        A pair of one class with a cosine above 1 - 1e-5 is taken for a sample and itself, and
        excluded, as in the official code of XBM.

        Args:
            embeddings: `[rows, dim]`, raw.
            labels: `[rows]`.
            candidates: raw vectors to compare the rows with; the rows themselves by default.
            candidate_labels: their labels.
            candidate_mask: candidates to include; None includes all.

        Returns:
            A float32 scalar.

        Raises:
            ValueError: candidates are given without labels, or labels or a mask without them.
        """
        rows = columns = numerics.normalize(embeddings)
        if candidates is not None and candidate_labels is not None:
            columns = numerics.normalize(candidates)
        elif candidates is None and candidate_labels is None and candidate_mask is None:
            candidate_labels = labels
        else:
            raise UserError("a loss of pairs needs candidates together with candidate_labels")
        similarities = numerics.inner_products(rows, columns)
        same = labels[:, None] == candidate_labels[None]
        included = jnp.ones((), bool) if candidate_mask is None else candidate_mask[None]
        # Negated, so that NaN propagates.
        positive = same & ~(similarities >= 1 - 1e-5) & included
        return jnp.mean(self.of_rows(similarities, positive, ~same & included))


def of_proxies(loss: Loss) -> ProxyLoss:
    """Returns a loss that must be one of proxies.

    Raises:
        ValueError: it is a loss of pairs.
    """
    if not isinstance(loss, ProxyLoss):
        raise UserError(f"{loss} has no proxies; choose a loss of dml_jax.losses.names()")
    return loss
