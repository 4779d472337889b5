"""Proxy losses: how an embedding is pulled to its class's proxy and pushed from the others.

A loss is a callable `loss(embeddings, proxies, labels) -> scalar` of raw (unnormalised) vectors.
Losses of unit vectors are finite, with finite gradients, for all finite vectors. Those whose logits
grow with the embedding's length, `softmax` and `sphereface`, are so for entries up to 1e30
(`softmax` beside proxies of about 1); beyond 1e37 their logits are no float32 numbers any more.
Adding one takes a class here, named in `_LOSSES`. Proxy Synthesis, MemVir, the train step and the
configurations need of it only what `ProxyLoss` names, which for a loss like softmax is `logits`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dml_jax import numerics

_LEAST_SQUARED_SINE = 1e-7
"""Below it an angle's slope by its cosine, which is infinite at 0 and pi, is taken for zero."""


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

    bias: bool = False

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


@dataclasses.dataclass(frozen=True)
class CosFace(NormSoftmax):
    """Norm-SoftMax with the target's cosine lowered by `margin`.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, CVPR 2018,
    equation 4.
    """

    scale: float = 64.0
    margin: float = 0.35

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * (cos - margin)`."""
        return logits - self.scale * self.margin


@dataclasses.dataclass(frozen=True)
class ArcFace(NormSoftmax):
    """Norm-SoftMax with the target's angle raised by `margin` radians.

    Where the raised angle would pass pi, the cosine is lowered by `margin * sin(margin)` instead,
    so that the loss keeps falling with the angle.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, CVPR 2019,
    equation 3.
    """

    scale: float = 64.0
    margin: float = 0.5

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * cos(angle + margin)`."""
        cosine = logits / self.scale
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, _LEAST_SQUARED_SINE))
        raised = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        lowered = cosine - self.margin * math.sin(self.margin)
        return self.scale * jnp.where(cosine >= -math.cos(self.margin), raised, lowered)


@dataclasses.dataclass(frozen=True)
class SphereFace(NormSoftmax):
    """Cross-entropy on `scale * |x| * cos`, the target's angle multiplied by `margin`.

    `(-1)^k cos(margin * angle) - 2k` with `k = floor(margin * angle / pi)` makes the multiplied
    angle's cosine fall all the way. Proxies are unit vectors, embeddings keep their length: it is
    mixed and remembered with them.

    Source: Liu et al., SphereFace: Deep hypersphere embedding for face recognition, CVPR 2017,
    equation 7.
    """

    scale: float = 1.0
    margin: float = 4.0

    def prepare(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies pdim"]
    ) -> tuple[Float[Array, "rows pdim"], Float[Array, "proxies pdim"]]:
        """Raw embeddings, unit proxies."""
        return embeddings.astype(jnp.float32), numerics.normalize(proxies)

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`scale * |x| * ((-1)^k cos(margin * angle) - 2k)`."""
        length = self.scale * numerics.lengths(embeddings)
        cosine = logits / jnp.where(length > 0, length, 1.0)
        bound = 1 - _LEAST_SQUARED_SINE / 2
        angle = self.margin * jnp.arccos(jnp.clip(cosine, -bound, bound))
        turns = jnp.floor(angle / math.pi)
        return length * ((1 - 2 * (turns % 2)) * jnp.cos(angle) - 2 * turns)


@dataclasses.dataclass(frozen=True)
class SoftTriple(SoftmaxLoss):
    """Cross-entropy on `la * (similarity - margin at the target)`, classes having several centres.

    The similarity of a class is the mean of the cosines with its centres, weighted by the softmax
    of the cosines over `gamma`. Proxies are `[classes * centers_per_class, dim]`, class by class.
    `tau` weighs a regulariser that merges centres that a class does not need (equation 9): half the
    mean distance between two centres of a class, as in its authors' program, which divides the sum
    over unordered pairs by the number of ordered ones. It takes the classes of the step, including
    the synthetic ones, but not the virtual classes of MemVir.

    Source: Qian et al., SoftTriple loss: Deep metric learning without triplet sampling, ICCV 2019,
    equations 7 to 9.
    """

    la: float = 20.0
    gamma: float = 0.1
    margin: float = 0.01
    tau: float = 0.0
    centers_per_class: int = 10

    @property
    def proxies_per_class(self) -> int:
        """All of a class's centres."""
        return self.centers_per_class

    def logits(
        self, embeddings: Float[Array, "rows dim"], proxies: Float[Array, "proxies dim"]
    ) -> Float[Array, "rows classes"]:
        """`la` times the similarity."""
        cosines = numerics.inner_products(embeddings, proxies)
        cosines = cosines.reshape(len(embeddings), -1, self.centers_per_class)
        return self.la * jnp.sum(jax.nn.softmax(cosines / self.gamma) * cosines, axis=-1)

    def target(
        self, logits: Float[Array, " rows"], embeddings: Float[Array, "rows dim"]
    ) -> Float[Array, " rows"]:
        """`la * (similarity - margin)`."""
        return logits - self.la * self.margin

    def penalty(
        self, proxies: Float[Array, "proxies dim"], class_mask: Bool[Array, " classes"]
    ) -> Float[Array, ""]:
        """`tau` times half the mean distance between two centres of a class."""
        if self.tau == 0 or self.centers_per_class == 1:
            return jnp.zeros(())
        centers = proxies.reshape(-1, self.centers_per_class, proxies.shape[-1])
        first, second = jnp.triu_indices(self.centers_per_class, k=1)
        distances = numerics.lengths(centers[:, first] - centers[:, second])
        return self.tau / 2 * jnp.mean(jnp.mean(distances, axis=1), where=class_mask)


@dataclasses.dataclass(frozen=True)
class ProxyAnchor(ProxyLoss):
    """For each proxy, the embeddings that are too far from it and those that are too near.

    The mean over proxies with a positive of `log(1 + sum_positive exp(-alpha * (cos - margin)))`,
    and over all proxies of `log(1 + sum_negative exp(alpha * (cos + margin)))`.

    Source: Kim et al., Proxy anchor loss for deep metric learning, CVPR 2020, equation 4.
    """

    alpha: float = 32.0
    margin: float = 0.1

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


_LOSSES: dict[str, type[ProxyLoss]] = {
    "softmax": Softmax,
    "norm_softmax": NormSoftmax,
    "proxy_nca": ProxyNCA,
    "cosface": CosFace,
    "arcface": ArcFace,
    "sphereface": SphereFace,
    "soft_triple": SoftTriple,
    "proxy_anchor": ProxyAnchor,
}
NAMES = tuple(_LOSSES)


def create(name: str, **hyperparameters: Any) -> ProxyLoss:
    """Makes a loss by name.

    >>> create("norm_softmax", scale=16.0)
    NormSoftmax(scale=16.0)

    Args:
        name: one of `NAMES`.
        **hyperparameters: the fields of the loss's class, which have defaults; a tuple may come as
            a list, as it does out of a JSON file.

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
    fields = {k: tuple(x) if isinstance(x, list) else x for k, x in hyperparameters.items()}
    return _LOSSES[name](**fields)
