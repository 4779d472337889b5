"""The methods once more, written as their definitions read, to hold the fast forms against."""

import math

import jax
import jax.numpy as jnp


def normalized(vectors):
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def cross_entropy(logits, labels, rows, classes):
    logits = jnp.where(classes[None, :], logits, -1e9)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels], where=rows)


def at_labels(logits, labels, function):
    """Logits with a function applied to each row's own label's."""
    own = jax.nn.one_hot(labels, logits.shape[1])
    return own * function(logits) + (1 - own) * logits


def softmax(e, p, labels, rows, classes):
    return cross_entropy(e @ p.T, labels, rows, classes)


def norm_softmax(e, p, labels, rows, classes, *, scale=23.0):
    return cross_entropy(scale * e @ p.T, labels, rows, classes)


def proxy_nca(e, p, labels, rows, classes, *, scale=12.0):
    gaps = e[:, None] - p[None]
    return cross_entropy(-scale * (gaps**2).sum(-1), labels, rows, classes)


def cosface(e, p, labels, rows, classes, *, scale=64.0, margin=0.35):
    logits = scale * at_labels(e @ p.T, labels, lambda cosine: cosine - margin)
    return cross_entropy(logits, labels, rows, classes)


def arcface(e, p, labels, rows, classes, *, scale=64.0, margin=0.5):
    def raised(cosine):
        angle = jnp.arccos(jnp.clip(cosine, -0.9999999, 0.9999999))
        lowered = cosine - margin * math.sin(margin)
        return jnp.where(angle + margin <= math.pi, jnp.cos(angle + margin), lowered)

    logits = scale * at_labels(e @ p.T, labels, raised)
    return cross_entropy(logits, labels, rows, classes)


def sphereface(e, p, labels, rows, classes, *, scale=1.0, margin=4):
    def multiplied(cosine):
        angle = jnp.arccos(jnp.clip(cosine, -0.9999999, 0.9999999))
        k = jax.lax.stop_gradient(jnp.floor(margin * angle / math.pi))
        return (-1) ** k * jnp.cos(margin * angle) - 2 * k

    length = jnp.linalg.norm(e, axis=1, keepdims=True)
    logits = scale * length * at_labels(e @ p.T / length, labels, multiplied)
    return cross_entropy(logits, labels, rows, classes)


def soft_triple(
    e, p, labels, rows, classes, *, la=20.0, gamma=0.1, margin=0.01, centers_per_class=10
):
    similar = (e @ p.T).reshape(len(e), -1, centers_per_class)
    weights = jnp.exp(similar / gamma) / jnp.exp(similar / gamma).sum(-1, keepdims=True)
    similarity = (weights * similar).sum(-1)
    logits = la * at_labels(similarity, labels, lambda own: own - margin)
    return cross_entropy(logits, labels, rows, classes)


def proxy_anchor(e, p, labels, rows, classes, *, alpha=32.0, margin=0.1):
    similarity = e @ p.T
    positive = (labels[:, None] == jnp.arange(len(p))[None]) & rows[:, None]
    negative = (labels[:, None] != jnp.arange(len(p))[None]) & rows[:, None]
    pull = jnp.where(positive, jnp.exp(-alpha * (similarity - margin)), 0.0).sum(0)
    push = jnp.where(negative, jnp.exp(alpha * (similarity + margin)), 0.0).sum(0)
    with_positives = positive.any(0) & classes
    return jnp.mean(jnp.log1p(pull), where=with_positives) + jnp.mean(
        jnp.log1p(push), where=classes
    )


# Each of vectors as `prepared` gives them.
LOSSES = {
    function.__name__: function
    for function in (
        softmax,
        norm_softmax,
        proxy_nca,
        cosface,
        arcface,
        sphereface,
        soft_triple,
        proxy_anchor,
    )
}


def prepared(name, embeddings, proxies):
    """What is mixed and remembered: unit vectors, but raw ones of plain softmax, and SphereFace's
    embeddings with their lengths.
    """
    raw = name == "softmax"
    return (
        embeddings if raw or name == "sphereface" else normalized(embeddings),
        proxies if raw else normalized(proxies),
    )


# Weights and partners of Proxy Synthesis, where it adds nothing.
NOTHING = jnp.zeros(0), jnp.zeros((0, 0), int)


class DenseMemVir:
    """MemVir as published: a list of all that was, and one matrix of all rows and all proxies.

    Calling it gives a step's loss and its gradients by embeddings and proxies; then the step is
    remembered. Proxy Synthesis may add `synthetic` classes to a step, which are in no memory.
    """

    def __init__(
        self,
        name,
        *,
        num_steps,
        step_gap,
        batch,
        classes,
        synthetic=0,
        dtype=jnp.float32,
        **hyperparameters,
    ):
        self.num_steps, self.step_gap = num_steps, step_gap
        self.name, self.dtype = name, dtype
        self.steps = []

        def loss(embeddings, proxies, labels, virtual, exist, lam, partner):
            rows, columns = prepared(name, embeddings, proxies)
            first = jnp.arange(synthetic) % batch
            second, lam = partner.reshape(-1)[:synthetic], jnp.repeat(lam, batch)[:synthetic, None]
            own = columns.reshape(classes, -1)[labels]
            mixed = prepared(
                name,
                lam * rows[first] + (1 - lam) * rows[second],
                (lam * own[first] + (1 - lam) * own[second]).reshape(-1, columns.shape[1]),
            )
            differ = labels[first] != labels[second]
            rows = jnp.concatenate([rows, mixed[0], *[old for old, _, _ in virtual]])
            columns = jnp.concatenate([columns, mixed[1], *[old for _, old, _ in virtual]])
            present = classes + synthetic
            labels = [labels, classes + jnp.arange(synthetic)] + [
                present + k * classes + old for k, (_, _, old) in enumerate(virtual)
            ]
            row_exists = [jnp.ones(batch, bool), differ, jnp.repeat(exist, batch)]
            class_exists = [jnp.ones(classes, bool), differ, jnp.repeat(exist, classes)]
            problem = map(jnp.concatenate, (labels, row_exists, class_exists))
            return LOSSES[name](rows, columns, *problem, **hyperparameters)

        self.value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def __call__(self, embeddings, proxies, labels, *mixing):
        rows, columns = (
            x.astype(self.dtype).astype(jnp.float32)
            for x in prepared(self.name, embeddings, proxies)
        )
        step = rows, columns, labels
        ages = [(k + 1) * (self.step_gap + 1) for k in range(self.num_steps)]
        exist = jnp.asarray([age <= len(self.steps) for age in ages], bool)
        # Steps that are not there yet are filled in, and masked out.
        virtual = [self.steps[-age] if age <= len(self.steps) else step for age in ages]
        problem = embeddings, proxies, labels, virtual, exist
        result = self.value_and_grad(*problem, *(mixing or NOTHING))
        self.steps.append(step)
        return result
