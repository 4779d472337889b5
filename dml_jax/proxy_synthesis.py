"""Proxy Synthesis: synthetic classes, interpolated between pairs of training classes.

Source: Gu, Ko and Kim, Proxy Synthesis: Learning with synthetic classes for deep metric learning,
AAAI 2021 (arXiv 2103.15454), equations 5 and 6.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dml_jax import losses
from dml_jax._utils import numerics, sharding
from dml_jax._utils.errors import UserError
from dml_jax.losses.base import ClassMask, Embeddings, Labels, RawProxies, RowMask
from dml_jax.settings import choice, flag, number, optional, setting, together

BatchLabels = Int[Array, " batch"]
Permutation = Int[Array, " batch"]

_SWAP_ROUNDS = 8
"""Rounds of swaps. For 128 samples of 20 classes, at most 1 draw in 1000 needs more."""

MIXES = ("both", "proxies", "embeddings")
"""What of the mixtures joins the batch; see `synthesize`."""


@dataclasses.dataclass(frozen=True)
class ProxySynthesisConfig:
    """The settings of Proxy Synthesis."""

    ratio: float = setting(
        0.0,
        number(least=0.0),
        help="Synthetic classes per sample, the paper's mu; 0 disables Proxy Synthesis.",
    )
    alpha: float = setting(
        0.4, number(above=0.0), help="Mixing weights are drawn from Beta(alpha, alpha)."
    )
    lam: float | None = setting(
        None,
        optional(number(least=0.0, most=1.0)),
        help="Ablation: the mixing weight of all pairs; None draws it.",
    )
    per_sample: bool = setting(
        False, flag(), help="Ablation: whether to draw a mixing weight for each pair."
    )
    same_class: bool = setting(
        False,
        flag(),
        help="Ablation: whether partners are chosen without regard to the class, so that pairs of "
        "one class make synthetic classes too.",
    )
    mix: str = setting(
        "both",
        choice(MIXES),
        help="Ablation: what of the mixtures joins the batch: `both`; `proxies`, as negatives "
        "without members; or `embeddings`, as samples of the class with the larger weight.",
    )
    stop_gradient: bool = setting(
        False, flag(), help="Ablation: whether no gradients flow through the mixtures."
    )

    def of_draw(self) -> dict[str, Any]:
        """Returns the arguments of `draw` among the settings."""
        names = ("alpha", "ratio", "lam", "per_sample", "same_class")
        return {name: getattr(self, name) for name in names}

    def of_synthesis(self) -> dict[str, Any]:
        """Returns the arguments of `synthesize` among the settings."""
        names = ("ratio", "mix", "stop_gradient", "same_class")
        return {name: getattr(self, name) for name in names}

    @together("lam", "per_sample")
    def _one_weight(self) -> str | None:
        if self.lam is None or not self.per_sample:
            return None
        return (
            f"config.proxy_synthesis.lam is {self.lam} for all pairs, but per_sample asks for a "
            "weight for each; set one of them"
        )


class Synthesized(NamedTuple):
    """A batch followed by its synthetic classes, prepared for the loss, with masks.

    Row `B + i` is the only member of class `C + i`, whose proxy is row `C + i` of the proxies. (If
    classes are split over devices, their order is another, and ablations leave out rows or classes;
    see `synthesize`.) The fields are the arguments of a `ProxyLoss`.
    """

    embeddings: Embeddings
    proxies: RawProxies
    labels: Labels
    row_mask: RowMask
    class_mask: ClassMask


def draw(
    key: PRNGKeyArray,
    labels: BatchLabels,
    *,
    alpha: float,
    ratio: float,
    lam: float | None = None,
    per_sample: bool = False,
    same_class: bool = False,
) -> tuple[Float[Array, "draws *batch"], Int[Array, "draws batch"]]:
    """Returns `ceil(ratio)` draws of a mixing weight and of a partner for each sample.

    The partners of a draw are a permutation of the batch with as few pairs of one class as
    possible: none, unless one class fills more than half of the batch. Otherwise they are random.
    If the classes are equally large, each sample of another class is an equally likely partner, and
    the partners of two samples are nearly independent. The official implementation has the same
    properties: it shuffles the batch until no two neighbours share a class, and pairs neighbours.

    Args:
        key: a random key.
        labels: `[batch]`.
        alpha: mixing weights are drawn from Beta(alpha, alpha).
        ratio: synthetic classes per sample, the paper's mu.
        lam: the mixing weight of all draws; None draws them.
        per_sample: whether to draw a mixing weight for each sample.
        same_class: whether partners are neighbours in a random order, whatever their classes.

    Returns:
        The weight of each sample against its partner, `[draws]`, or `[draws, batch]` if
        `per_sample`, and the index of each sample's partner, `[draws, batch]`.
    """
    draws = math.ceil(ratio)
    weight_key, *partner_keys = jax.random.split(key, 1 + draws)
    shape = (draws, labels.shape[0]) if per_sample else (draws,)
    drawn = numerics.draw_beta(weight_key, alpha, shape)
    weights = drawn if lam is None else jnp.full(shape, lam, drawn.dtype)
    choose = _neighbours if same_class else _partners
    partner = [choose(partner_key, labels) for partner_key in partner_keys]
    return weights, jnp.reshape(jnp.asarray(partner, jnp.int32), (draws, labels.shape[0]))


def _neighbours(key: PRNGKeyArray, labels: BatchLabels) -> Permutation:
    """Returns each sample's neighbour in a random order of the batch."""
    order = jax.random.permutation(key, labels.shape[0])
    return jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))


def _partners(key: PRNGKeyArray, labels: BatchLabels) -> Permutation:
    """Returns a permutation of the batch; `draw` describes its distribution."""
    order = jax.random.permutation(key, labels.shape[0])
    shuffled = labels[order]
    partner = _swapped_neighbours(shuffled)
    # Swapping almost never leaves a pair of one class, unless few classes fill the batch.
    fallback = _shifted_by_class(shuffled)
    worse = jnp.sum(shuffled[partner] == shuffled) > jnp.sum(shuffled[fallback] == shuffled)
    partner = jnp.where(worse, fallback, partner)
    return jnp.zeros_like(order).at[order].set(order[partner])


def _swapped_neighbours(labels: BatchLabels) -> Permutation:
    """Returns each sample's neighbour, after swaps that break up pairs of one class.

    In each round every sample is matched with another one, and the two swap partners if that
    leaves fewer pairs of one class. Other samples keep their neighbours, so the partners stay as
    random as the order of the samples.
    """
    indices = jnp.arange(len(labels))

    def swap(i: Int[Array, ""], partner: Permutation) -> Permutation:
        match = (i - indices) % len(labels)  # Symmetric: i - (i - index) = index.
        swapped = partner[match]
        same_before = (labels[partner] == labels).astype(jnp.int32)
        same_after = (labels[swapped] == labels).astype(jnp.int32)
        better = (same_after + same_after[match]) < (same_before + same_before[match])
        return jnp.where(better, swapped, partner)

    return jax.lax.fori_loop(0, _SWAP_ROUNDS, swap, jnp.roll(indices, -1))


def _shifted_by_class(labels: BatchLabels) -> Permutation:
    """Returns partners with as few pairs of one class as a permutation of the batch allows.

    Sorts the samples by class, in the order of the classes' first members, and shifts them by the
    size of the largest class. The partners of one class's samples then come from few classes.
    """
    same_class = labels[:, None] == labels[None, :]
    by_class = jnp.argsort(jnp.argmax(same_class, axis=1))
    largest_class = jnp.max(jnp.sum(same_class, axis=1))
    return jnp.zeros_like(by_class).at[by_class].set(jnp.roll(by_class, -largest_class))


def synthesize(
    embeddings: Float[Array, "batch dim"],
    proxies: Float[Array, "proxies pdim"],
    labels: BatchLabels,
    *,
    lam: Float[Array, "*draws"],
    partner: Int[Array, "*draws_batch"],
    ratio: float,
    loss: losses.ProxyLoss | None = None,
    class_mask: ClassMask | None = None,
    shards: int = 1,
    mix: str = "both",
    stop_gradient: bool = False,
    same_class: bool = False,
) -> Synthesized:
    """Returns the batch with synthetic embeddings and proxies, mixed from pairs of samples.

    The first `floor(ratio * batch)` samples each make a synthetic class. Its embedding is
    `lam * e_i + (1 - lam) * e_partner` of unit vectors, normalised again; its proxy is the same
    mixture of the two classes' proxies. Gradients flow through both.

    Args:
        embeddings: `[batch, dim]`, raw.
        proxies: `[classes, dim]`, raw.
        labels: `[batch]`, in `0..classes - 1`.
        lam: weight of the sample against its partner: a scalar, `[draws]` or `[draws, batch]`.
        partner: index of each sample's partner, `[batch]` or `[draws, batch]`.
        ratio: synthetic classes per sample, the paper's mu, at most `draws`.
        loss: the loss that prepares the vectors: plain softmax mixes raw vectors, SoftTriple all
            centres of a class. By default vectors are normalised, with one proxy per class.
        class_mask: classes of `proxies` to include; None includes all.
        shards: number of devices that the classes are split over. The classes of each device are
            followed by its share of the synthetic ones, so that no proxy moves; these are padded to
            a multiple of `shards`, which must divide the numbers of classes and of samples.
        mix: what of the mixtures joins the batch. `both` is the method. `proxies` masks the
            synthetic embeddings, so that the synthetic classes are negatives of the samples and
            have no members. `embeddings` masks the synthetic proxies; each synthetic embedding is
            then a further sample of the class with the larger weight, the first one's if the
            weights are equal.
        stop_gradient: whether mixtures have no gradients. The samples, and the proxies of their
            classes, still have those of their own terms against the mixtures.
        same_class: whether pairs of one class make synthetic classes, too.

    Returns:
        The enlarged batch. The masks exclude padding, what `mix` excludes, and pairs of one class,
        which are not a new class.

    Raises:
        ValueError: `ratio` needs more draws than there are, or `mix` is unknown.
    """
    if mix not in MIXES:
        raise UserError(f"mix is {mix!r}; choose one of {', '.join(MIXES)}")
    loss = losses.NormSoftmax() if loss is None else loss
    batch, per_class = len(embeddings), loss.proxies_per_class
    classes = len(proxies) // per_class
    partner = jnp.atleast_2d(partner)
    # 0.29 * 100 is 28.999999999999996, but should give 29 synthetic classes.
    count = math.floor(ratio * batch + 1e-6)
    if not 0 <= count <= partner.size:
        raise UserError(
            f"ratio={ratio} needs {count} synthetic classes, but {partner.shape[0]} draw(s) of "
            f"partners for {batch} samples give 0 to {partner.size}; draw more partners or lower "
            "ratio"
        )
    padded = sharding.padded(count, shards)
    embeddings, proxies = loss.prepare(embeddings, proxies)
    first = jnp.arange(padded) % batch
    second = partner.reshape(-1)[:padded]
    of_draws = lam.reshape(-1) if lam.ndim == 2 else jnp.repeat(jnp.atleast_1d(lam), batch)
    weight = of_draws[:padded, None]
    by_class = proxies.reshape(classes, -1)
    target_proxies = sharding.replicate(by_class[labels])

    def mixture(vectors: Float[Array, "batch n"]) -> Float[Array, "synthetic n"]:
        return weight * vectors[first] + (1 - weight) * vectors[second]

    mixed_embeddings, mixed_proxies = loss.prepare(
        sharding.replicate(mixture(embeddings)),
        mixture(target_proxies).reshape(-1, proxies.shape[1]),
    )
    if stop_gradient:
        mixed_embeddings, mixed_proxies = jax.lax.stop_gradient((mixed_embeddings, mixed_proxies))
    valid = jnp.arange(padded) < count
    if not same_class:
        valid = (labels[first] != labels[second]) & valid
    with_member = valid if mix != "proxies" else jnp.zeros_like(valid)
    with_proxy = valid if mix != "embeddings" else jnp.zeros_like(valid)
    class_mask = jnp.ones(classes, bool) if class_mask is None else class_mask
    joined = sharding.join(by_class, mixed_proxies.reshape(padded, by_class.shape[1]), shards)
    order = jnp.arange(classes + padded, dtype=labels.dtype)
    _, synthetic_labels = sharding.unjoin(order, classes, shards)
    labels = sharding.joined_positions(labels, classes, padded, shards)
    if mix == "embeddings":
        synthetic_labels = jnp.where(weight[:, 0] >= 0.5, labels[first], labels[second])
    return Synthesized(
        embeddings=jnp.concatenate([embeddings, mixed_embeddings]),
        proxies=joined.reshape(-1, proxies.shape[1]),
        labels=jnp.concatenate([labels, synthetic_labels]),
        row_mask=jnp.concatenate([jnp.ones(batch, bool), with_member]),
        class_mask=sharding.join(class_mask, with_proxy, shards),
    )
