"""How the confidence in a class changes between the embeddings of two classes.

Source: Gu, Ko and Kim, Proxy Synthesis, AAAI 2021 (arXiv 2103.15454), its figure of the decision
boundaries, which are smoother with synthetic classes. The choice of the pairs is ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from dml_jax import losses
from dml_jax.inference import trained
from dml_jax.inference.trained import TrainingState
from dml_jax.training.builder import Experiment

POSITIONS = np.linspace(0, 1, 41, dtype=np.float32)
"""Positions between the embedding of the first class, 0, and that of the second, 1."""

_IMAGES = 200
_PAIRS = 4000
_AT_ONCE = 200  # Pairs in memory.


def confidence(
    loss: losses.ProxyLoss,
    first: Float[Array, "pairs dim"],
    second: Float[Array, "pairs dim"],
    first_proxies: Float[Array, "pairs per_class pdim"],
    second_proxies: Float[Array, "pairs per_class pdim"],
    positions: Float[Array, " positions"],
) -> Float[Array, " positions"]:
    """Returns the mean softmax confidence in the first of two classes between their embeddings.

    At position t the embedding is `(1 - t) * first + t * second` of prepared embeddings, prepared
    again: normalised, for most losses. The confidence is the softmax over the two classes' logits,
    without a margin.

    Args:
        loss: a loss whose anchors are the rows.
        first: raw embeddings of images of the first class of each pair.
        second: raw embeddings of images of the second class.
        first_proxies: raw proxies of the first class of each pair.
        second_proxies: raw proxies of the second class.
        positions: positions in 0..1.
    """

    def of_pair(pair: tuple[Array, ...]) -> Array:
        a, b, *proxies = pair
        ends, columns = loss.prepare(jnp.stack([a, b]), jnp.concatenate(proxies))
        t = positions[:, None]
        rows, columns = loss.prepare((1 - t) * ends[:1] + t * ends[1:], columns)
        return jax.nn.softmax(loss.logits(rows, columns), axis=1)[:, 0]

    pairs = first, second, first_proxies, second_proxies
    return jnp.mean(jax.lax.map(of_pair, pairs, batch_size=_AT_ONCE), axis=0)


def compute(built: Experiment, state: TrainingState) -> Float32[np.ndarray, " positions"] | None:
    """Returns the mean confidence at `POSITIONS` for pairs of training images of different classes.

    Args:
        built: the experiment of a run.
        state: its state at a checkpoint.

    Returns:
        The confidence; None if the anchors of the loss are classes, so that it has no softmax over
        them.
    """
    loss = losses.of_proxies(built.config.loss)
    if loss.class_anchors:
        return None
    source = built.sources["train"]
    images, pairs = choose(source.labels)
    embeddings = trained.embed_some(built, state, source, images)
    first, second = pairs.T
    proxies = state.proxies.reshape(len(source.class_names), loss.proxies_per_class, -1)
    of_image = proxies[source.labels[images]]
    return np.asarray(
        jax.jit(confidence, static_argnums=0)(
            loss,
            *(embeddings[first], embeddings[second], of_image[first], of_image[second]),
            POSITIONS,
        )
    )


def choose(
    labels: Integer[np.ndarray, " n"],
) -> tuple[Integer[np.ndarray, " images"], Integer[np.ndarray, "pairs 2"]]:
    """Returns random images, and random pairs of these that are of different classes.

    Args:
        labels: class of each image; there are at least two classes.
    """
    rng = np.random.default_rng(0)
    # An image of each class comes first, so that there is more than one class.
    order = rng.permutation(len(labels))
    _, first_of_class = np.unique(labels[order], return_index=True)
    images = np.unique(np.concatenate([order[rng.permutation(first_of_class)], order])[:_IMAGES])
    pairs = rng.integers(len(images), size=(_PAIRS, 2))
    differ = labels[images][pairs[:, 0]] != labels[images][pairs[:, 1]]
    return images, pairs[differ]
