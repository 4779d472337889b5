"""The interface of a proxy loss, which Proxy Synthesis and MemVir work with."""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax._utils import numerics


@dataclasses.dataclass(frozen=True)
class ProxyLoss(abc.ABC):
    """A mean over units, each of which sums exponentials of its logits against all others.

    The units of a softmax are the rows, which sum over classes; those of Proxy-Anchor are the
    classes, which sum over rows. MemVir sums `logits` in parts, over some of the others at a time.
    """

    per_class: ClassVar[bool] = False
    """Whether the units are the classes, not the rows."""

    def proxy_shape(self, num_classes: int, dim: int) -> tuple[int, int]:
        """The shape of the proxies of so many classes, for embeddings of `dim` numbers."""
        return num_classes * self.proxies_per_class, dim

    @property
    def proxies_per_class(self) -> int:
        """How many rows of the proxies belong to each class, one after the other."""
        return 1

    def prepare(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies pdim"]
    ) -> tuple[Float[Array, "rows pdim"], Float[Array, "proxies pdim"]]:
        """What is mixed, remembered and multiplied: by default unit vectors, in float32."""
        return numerics.normalize(embeddings), numerics.normalize(proxies)

    @abc.abstractmethod
    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """The logits of prepared embeddings against prepared proxies, without any margin.

        Each depends on its own row and its own class's proxies alone.
        """

    @abc.abstractmethod
    def within(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies dim"],
        labels: Int[Array, " rows"],
        row_mask: Bool[Array, " rows"],
        class_mask: Bool[Array, " classes"],
    ) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """What prepared rows and their own classes have to do with one another.

        Returns:
            `[units]` the log-sum-exp of each unit, and `[units]` what it has with its own class.
        """

    @abc.abstractmethod
    def mean(
        self,
        sums: Float[Array, " units"],
        own: Float[Array, " units"],
        counts: Bool[Array, " units"],
    ) -> Float[Array, ""]:
        """The loss of units whose sums are complete.

        Args:
            sums: the log-sum-exp of each unit over all others.
            own: as `within` gives it.
            counts: which units count.
        """

    def penalty(
        self, proxies: Float[Array, "proxies dim"], class_mask: Bool[Array, " classes"]
    ) -> Float[Array, ""]:
        """What is added to the loss for the prepared proxies alone; by default nothing."""
        del proxies, class_mask
        return jnp.zeros(())

    def __call__(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies pdim"],
        labels: Int[Array, " rows"],
        *,
        row_mask: Bool[Array, " rows"] | None = None,
        class_mask: Bool[Array, " classes"] | None = None,
    ) -> Float[Array, ""]:
        """The mean loss of a batch.

        Args:
            embeddings: `[rows, dim]`, raw.
            proxies: raw, `[classes, dim]` or as `proxy_shape` has it.
            labels: `[rows]`, in `0..classes - 1`.
            row_mask: rows that count; None counts all.
            class_mask: classes that exist; None takes all.

        Returns:
            A float32 scalar.
        """
        rows, columns = self.prepare(embeddings, proxies)
        row_mask, class_mask = self.masks(rows, columns, row_mask, class_mask)
        sums, own = self.within(rows, columns, labels, row_mask, class_mask)
        counts = class_mask if self.per_class else row_mask
        return self.mean(sums, own, counts) + self.penalty(columns, class_mask)

    def masks(
        self,
        embeddings: Float[Array, "rows dim"],
        proxies: Float[Array, "proxies dim"],
        row_mask: Bool[Array, " rows"] | None,
        class_mask: Bool[Array, " classes"] | None,
    ) -> tuple[Bool[Array, " rows"], Bool[Array, " classes"]]:
        """The masks, of which None stands for all that there is."""
        if row_mask is None:
            row_mask = jnp.ones(len(embeddings), bool)
        if class_mask is None:
            class_mask = jnp.ones(len(proxies) // self.proxies_per_class, bool)
        return row_mask, class_mask
