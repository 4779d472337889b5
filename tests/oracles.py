"""The methods once more, written as their definitions read, to hold the fast forms against."""

import jax
import jax.numpy as jnp


def normalized(vectors):
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


class DenseMemVir:
    """MemVir as published: a list of all that was, and one matrix of all rows and all proxies.

    Calling it gives a step's loss and its gradients by embeddings and proxies; then the step is
    remembered. Rows and proxies beyond `batch` and `classes` are synthetic, and in no memory.
    """

    def __init__(self, loss, *, num_steps, step_gap, batch, classes, dtype=jnp.float32):
        self.num_steps, self.step_gap, self.batch, self.classes = (
            num_steps,
            step_gap,
            batch,
            classes,
        )
        self.dtype = dtype
        self.steps = []
        self.value_and_grad = jax.jit(
            jax.value_and_grad(lambda e, p, *rest: dense_loss(loss, e, p, *rest), argnums=(0, 1))
        )

    def __call__(self, embeddings, proxies, labels):
        def kept(vectors):
            return normalized(vectors).astype(self.dtype).astype(jnp.float32)

        step = (
            kept(embeddings[: self.batch]),
            kept(proxies[: self.classes]),
            labels[: self.batch],
        )
        ages = [(k + 1) * (self.step_gap + 1) for k in range(self.num_steps)]
        exist = jnp.asarray([age <= len(self.steps) for age in ages])
        # Steps that are not there yet are filled in, and masked out.
        virtual = [self.steps[-age] if age <= len(self.steps) else step for age in ages]
        result = self.value_and_grad(embeddings, proxies, labels, virtual, exist)
        self.steps.append(step)
        return result


def dense_loss(loss, embeddings, proxies, labels, virtual, exist):
    batch, classes = len(virtual[0][0]), len(virtual[0][1])
    rows = jnp.concatenate([normalized(embeddings), *[old for old, _, _ in virtual]])
    columns = jnp.concatenate([normalized(proxies), *[old for _, old, _ in virtual]])
    new_labels = [len(proxies) + k * classes + old for k, (_, _, old) in enumerate(virtual)]
    labels = jnp.concatenate([labels, *new_labels])
    row_exists = jnp.concatenate([jnp.ones(len(embeddings), bool), jnp.repeat(exist, batch)])
    column_exists = jnp.concatenate([jnp.ones(len(proxies), bool), jnp.repeat(exist, classes)])

    logits = loss.logits(rows, columns)
    at_label = jnp.arange(len(labels)), labels
    logits = logits.at[at_label].set(loss.target(logits[at_label]))
    log_probabilities = jax.nn.log_softmax(logits, where=column_exists[None, :], axis=1)
    return -jnp.mean(log_probabilities[at_label], where=row_exists)
