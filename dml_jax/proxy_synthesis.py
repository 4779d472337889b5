"""Proxy Synthesis: classes that do not exist, mixed from pairs of those that do.

Source: Gu, Ko and Kim, Proxy Synthesis: Learning with synthetic classes for deep metric learning,
AAAI 2021 (arXiv 2103.15454), equations 5 and 6.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dml_jax import losses
from dml_jax.settings import number, setting

_EXCHANGES = 8
"""Rounds of exchanges. Of 128 samples drawn from 20 classes, 1 draw in 1000 or fewer needs more."""


@dataclasses.dataclass(frozen=True)
class ProxySynthesisConfig:
    """The settings of Proxy Synthesis."""

    ratio: float = setting(
        0.0,
        number(least=0.0),
        help="Synthetic classes per sample, the paper's mu; 0 is no Proxy Synthesis.",
    )
    alpha: float = setting(
        0.4, number(above=0.0), help="Mixing weights are drawn from Beta(alpha, alpha)."
    )


class Synthesized(NamedTuple):
    """A batch with its synthetic classes behind it, prepared for its loss, and what of it counts.

    Row `B + i` is the only member of class `C + i`, whose proxy is row `C + i` of the proxies.
    """

    embeddings: Float[Array, "rows dim"]
    proxies: Float[Array, "proxies pdim"]
    labels: Int[Array, " rows"]
    row_mask: Bool[Array, " rows"]
    class_mask: Bool[Array, " classes"]


def draw(
    key: PRNGKeyArray, labels: Int[Array, " batch"], *, alpha: float, ratio: float
) -> tuple[Float[Array, " draws"], Int[Array, "draws batch"]]:
    """Returns mixing weights and every sample's partner, one draw for each started unit of `ratio`.

    The partners of a draw are a permutation of the batch that pairs as few samples as possible with
    their own class: none, unless one class fills more than half of the batch. Apart from that they
    are random: a sample has each partner of other classes with the same probability where classes
    are equally large, and the partners of two samples are nearly independent, as in the official
    program, which shuffles the batch until no two neighbours share a class and takes the neighbour.

    Args:
        key: a random key.
        labels: `[batch]`.
        alpha: mixing weights come from Beta(alpha, alpha).
        ratio: synthetic classes per sample, the paper's mu.

    Returns:
        Weights of the samples against their partners, `[draws]`, and partners' positions in the
        batch, `[draws, batch]`.
    """
    draws = math.ceil(ratio)
    weight_key, *partner_keys = jax.random.split(key, 1 + draws)
    lam = jax.random.beta(weight_key, alpha, alpha, (draws,))
    partner = [_partners(partner_key, labels) for partner_key in partner_keys]
    return lam, jnp.reshape(jnp.asarray(partner, jnp.int32), (draws, labels.shape[0]))


def _partners(key: PRNGKeyArray, labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Returns a permutation of the batch; see `draw` for its distribution."""
    order = jax.random.permutation(key, labels.shape[0])
    shuffled = labels[order]
    partner = _exchanged_neighbours(shuffled)
    # Exchanging leaves a pair of one class behind about never, unless few classes fill the batch.
    fallback = _next_class(shuffled)
    worse = jnp.sum(shuffled[partner] == shuffled) > jnp.sum(shuffled[fallback] == shuffled)
    partner = jnp.where(worse, fallback, partner)
    return jnp.zeros_like(order).at[order].set(order[partner])


def _exchanged_neighbours(labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Returns each sample's neighbour, after samples paired with their own class exchanged theirs.

    In each round every sample meets another and exchanges partners with it where that leaves fewer
    pairs of one class. Samples that meet no such pair keep their neighbours, so that partners stay
    as random as the order of the samples.
    """
    places = jnp.arange(len(labels))
    partner = jnp.roll(places, -1)
    for i in range(_EXCHANGES):
        met = (i - places) % len(labels)  # Who meets whom is mutual: i - (i - place) = place.
        offered = partner[met]
        kept_pairs = (labels[partner] == labels).astype(jnp.int32)
        new_pairs = (labels[offered] == labels).astype(jnp.int32)
        better = (new_pairs + new_pairs[met]) < (kept_pairs + kept_pairs[met])
        partner = jnp.where(better, offered, partner)
    return partner


def _next_class(labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Returns partners that share a class as seldom as a permutation of the batch allows.

    With the samples grouped by class, classes in the order of their first members, each sample
    takes the one that stands as many places on as the largest class has members. Samples of one
    class then share few classes of partners.
    """
    same_class = labels[:, None] == labels[None, :]
    by_class = jnp.argsort(jnp.argmax(same_class, axis=1))
    largest_class = jnp.max(jnp.sum(same_class, axis=1))
    return jnp.zeros_like(by_class).at[by_class].set(jnp.roll(by_class, -largest_class))


def synthesize(
    embeddings: Float[Array, "batch dim"],
    proxies: Float[Array, "proxies pdim"],
    labels: Int[Array, " batch"],
    *,
    lam: Float[Array, "*draws"],
    partner: Int[Array, "*draws_batch"],
    ratio: float,
    loss: losses.ProxyLoss | None = None,
) -> Synthesized:
    """Adds synthetic classes: mixtures of the samples and, alike, of their classes' proxies.

    Of unit vectors, `e' = lam * e_i + (1 - lam) * e_partner`, and the same of the two classes'
    proxies, for the first `floor(ratio * batch)` samples; all have unit length again. Gradients
    flow through everything.

    Args:
        embeddings: `[batch, dim]`, raw.
        proxies: `[classes, dim]`, raw.
        labels: `[batch]`, in `0..classes - 1`.
        lam: weight of the sample against its partner, a scalar or `[draws]`.
        partner: position of each sample's partner, `[batch]` or `[draws, batch]`.
        ratio: synthetic classes per sample, the paper's mu, at most `draws`.
        loss: whose vectors are mixed, as it prepares them: raw ones for plain softmax, all centres
            of a class for SoftTriple. By default one of unit vectors and one proxy a class.

    Returns:
        The enlarged problem. Masks leave out pairs that share a class, which are no new class.

    Raises:
        ValueError: there are fewer draws than `ratio` asks for.
    """
    loss = losses.NormSoftmax() if loss is None else loss
    batch, per_class = len(embeddings), loss.proxies_per_class
    classes = len(proxies) // per_class
    partner = jnp.atleast_2d(partner)
    # 0.29 * 100 is 28.999999999999996, and 29 synthetic classes are meant.
    count = math.floor(ratio * batch + 1e-6)
    if not 0 <= count <= partner.size:
        raise ValueError(
            f"ratio={ratio} asks for {count} synthetic classes, but {partner.shape[0]} draw(s) of "
            f"partners for {batch} samples allow 0 to {partner.size}; draw more, or lower ratio"
        )
    embeddings, proxies = loss.prepare(embeddings, proxies)
    first = jnp.arange(count) % batch
    second = partner.reshape(-1)[:count]
    weight = jnp.repeat(jnp.atleast_1d(lam), batch)[:count, None]
    own_proxies = proxies.reshape(classes, -1)[labels]

    def mix(vectors: Float[Array, "batch n"]) -> Float[Array, "synthetic n"]:
        return weight * vectors[first] + (1 - weight) * vectors[second]

    mixtures = loss.prepare(mix(embeddings), mix(own_proxies).reshape(-1, proxies.shape[1]))
    differ = labels[first] != labels[second]
    return Synthesized(
        embeddings=jnp.concatenate([embeddings, mixtures[0]]),
        proxies=jnp.concatenate([proxies, mixtures[1]]),
        labels=jnp.concatenate([labels, classes + jnp.arange(count, dtype=labels.dtype)]),
        row_mask=jnp.concatenate([jnp.ones(batch, bool), differ]),
        class_mask=jnp.concatenate([jnp.ones(classes, bool), differ]),
    )
