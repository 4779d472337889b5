"""Direct implementations of the losses and of MemVir, as references for the efficient ones."""

import math

import jax
import jax.numpy as jnp


def normalized(vectors):
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def cross_entropy(logits, labels, rows, classes):
    logits = jnp.where(classes[None, :], logits, -1e9)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels], where=rows)


def at_labels(logits, labels, function):
    """Returns the logits with a function applied to the target logits."""
    is_target = jax.nn.one_hot(labels, logits.shape[1])
    return is_target * function(logits) + (1 - is_target) * logits


def softmax(e, p, labels, rows, classes):
    return cross_entropy(e @ p.T, labels, rows, classes)


def virtual_softmax(e, p, labels, rows, classes):
    virtual = jnp.linalg.norm(e, axis=1) * jnp.linalg.norm(p[labels], axis=1)
    logits = jnp.concatenate([e @ p.T, virtual[:, None]], axis=1)
    return cross_entropy(logits, labels, rows, jnp.concatenate([classes, jnp.ones(1, bool)]))


def norm_softmax(e, p, labels, rows, classes, *, scale=23.0):
    return cross_entropy(scale * e @ p.T, labels, rows, classes)


def proxy_nca(e, p, labels, rows, classes, *, scale=12.0):
    differences = e[:, None] - p[None]
    return cross_entropy(-scale * (differences**2).sum(-1), labels, rows, classes)


def cosface(e, p, labels, rows, classes, *, scale=64.0, margin=0.35):
    logits = scale * at_labels(e @ p.T, labels, lambda cosine: cosine - margin)
    return cross_entropy(logits, labels, rows, classes)


def arcface(e, p, labels, rows, classes, *, scale=64.0, margin=0.5):
    def with_margin(cosine):
        angle = jnp.arccos(jnp.clip(cosine, -0.9999999, 0.9999999))
        fallback = cosine - margin * math.sin(margin)
        return jnp.where(angle + margin <= math.pi, jnp.cos(angle + margin), fallback)

    logits = scale * at_labels(e @ p.T, labels, with_margin)
    return cross_entropy(logits, labels, rows, classes)


def sphereface(e, p, labels, rows, classes, *, scale=1.0, margin=4):
    def with_margin(cosine):
        angle = jnp.arccos(jnp.clip(cosine, -0.9999999, 0.9999999))
        k = jax.lax.stop_gradient(jnp.floor(margin * angle / math.pi))
        return (-1) ** k * jnp.cos(margin * angle) - 2 * k

    length = jnp.linalg.norm(e, axis=1, keepdims=True)
    logits = scale * length * at_labels(e @ p.T / length, labels, with_margin)
    return cross_entropy(logits, labels, rows, classes)


def soft_triple(
    e, p, labels, rows, classes, *, la=20.0, gamma=0.1, margin=0.01, centers_per_class=10
):
    cosines = (e @ p.T).reshape(len(e), -1, centers_per_class)
    weights = jnp.exp(cosines / gamma) / jnp.exp(cosines / gamma).sum(-1, keepdims=True)
    similarity = (weights * cosines).sum(-1)
    logits = la * at_labels(similarity, labels, lambda target: target - margin)
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


# The arguments are prepared vectors, as `prepared` returns them.
LOSSES = {
    function.__name__: function
    for function in (
        softmax,
        virtual_softmax,
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
    """Returns unit vectors; raw ones for plain softmaxes, and raw embeddings for SphereFace."""
    raw = name in ("softmax", "virtual_softmax")
    return (
        embeddings if raw or name == "sphereface" else normalized(embeddings),
        proxies if raw else normalized(proxies),
    )


# Weights and partners for no synthetic class.
NO_MIXING = jnp.zeros(0), jnp.zeros((0, 0), int)


class DenseMemVir:
    """MemVir as published: a list of all earlier steps, and one matrix of all logits.

    A call returns the loss of a step and its gradients with respect to embeddings and proxies, and
    stores the step. Proxy Synthesis may add `synthetic` classes to a step, which are not stored.
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
            targets = columns.reshape(classes, -1)[labels]
            mixed = prepared(
                name,
                lam * rows[first] + (1 - lam) * rows[second],
                (lam * targets[first] + (1 - lam) * targets[second]).reshape(-1, columns.shape[1]),
            )
            valid = labels[first] != labels[second]
            rows = jnp.concatenate([rows, mixed[0], *[old for old, _, _ in virtual]])
            columns = jnp.concatenate([columns, mixed[1], *[old for _, old, _ in virtual]])
            present = classes + synthetic
            labels = [labels, classes + jnp.arange(synthetic)] + [
                present + k * classes + old for k, (_, _, old) in enumerate(virtual)
            ]
            row_exists = [jnp.ones(batch, bool), valid, jnp.repeat(exist, batch)]
            class_exists = [jnp.ones(classes, bool), valid, jnp.repeat(exist, classes)]
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
        # Steps that do not exist yet are replaced by this one and masked out.
        virtual = [self.steps[-age] if age <= len(self.steps) else step for age in ages]
        problem = embeddings, proxies, labels, virtual, exist
        result = self.value_and_grad(*problem, *(mixing or NO_MIXING))
        self.steps.append(step)
        return result
