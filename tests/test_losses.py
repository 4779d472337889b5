import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax import losses
from tests.oracles import normalized

BATCH, CLASSES, DIM = 6, 5, 8


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    embeddings = jnp.asarray(rng.normal(size=(BATCH, DIM)), jnp.float32)
    proxies = jnp.asarray(rng.normal(size=(CLASSES, DIM)), jnp.float32)
    return embeddings, proxies, jnp.asarray(rng.integers(CLASSES, size=BATCH))


def cross_entropy(logits, labels):
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def test_norm_softmax_is_cross_entropy_of_scaled_cosines(problem):
    embeddings, proxies, labels = problem
    cosines = np.asarray(normalized(embeddings) @ normalized(proxies).T, np.float64)
    loss = losses.create("norm_softmax", scale=7.0)(*problem)
    chex.assert_trees_all_close(float(loss), cross_entropy(7 * cosines, labels), rtol=1e-6)


def test_proxy_nca_is_cross_entropy_of_negative_squared_distances(problem):
    embeddings, proxies, labels = problem
    gaps = np.asarray(normalized(embeddings)[:, None] - normalized(proxies)[None], np.float64)
    loss = losses.create("proxy_nca", scale=3.0)(*problem)
    expected = cross_entropy(-3 * (gaps**2).sum(-1), labels)
    chex.assert_trees_all_close(float(loss), expected, rtol=1e-6)


@pytest.mark.parametrize("name", losses.NAMES)
class TestEveryLoss:
    def test_ignores_the_lengths_of_vectors(self, name, problem):
        embeddings, proxies, labels = problem
        loss = losses.create(name)
        scaled = loss(1e3 * embeddings, 1e-3 * proxies, labels)
        chex.assert_trees_all_close(scaled, loss(*problem), rtol=1e-5)

    def test_leaves_out_what_the_masks_leave_out(self, name, problem):
        embeddings, proxies, labels = problem
        loss = losses.create(name)
        other = jnp.asarray(np.random.default_rng(1).normal(size=(2, DIM)), jnp.float32)
        value = loss(
            jnp.concatenate([embeddings, other]),
            jnp.concatenate([proxies, other]),
            jnp.concatenate([labels, CLASSES + jnp.arange(2)]),
            row_mask=jnp.arange(BATCH + 2) < BATCH,
            class_mask=jnp.arange(CLASSES + 2) < CLASSES,
        )
        chex.assert_trees_all_close(value, loss(*problem), rtol=1e-6)

    def test_takes_bfloat16_and_answers_in_float32(self, name, problem):
        embeddings, proxies, labels = problem
        assert losses.create(name)(embeddings.astype(jnp.bfloat16), proxies, labels).dtype == (
            jnp.float32
        )

    @pytest.mark.parametrize("kind", ["zero", "identical", "opposite", "huge", "tiny"])
    def test_is_finite_with_finite_gradients(self, name, kind, problem):
        embeddings, proxies, labels = problem
        embeddings = {
            "zero": jnp.zeros_like(embeddings),
            "identical": proxies[labels],
            "opposite": -proxies[labels],
            "huge": 1e30 * embeddings,
            "tiny": 1e-30 * embeddings,
        }[kind]
        value, gradients = jax.value_and_grad(losses.create(name), argnums=(0, 1))(
            embeddings, proxies, labels
        )
        chex.assert_tree_all_finite((value, gradients))

    def test_gradient_is_that_of_finite_differences(self, name, problem):
        embeddings, proxies, labels = problem
        loss = losses.create(name, scale=2.0)
        chex.assert_numerical_grads(
            lambda e, p: loss(jnp.asarray(e), jnp.asarray(p), labels),
            (embeddings, proxies),
            order=1,
            atol=1e-2,
        )


def test_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown loss 'norm'.*norm_softmax"):
        losses.create("norm")


def test_unknown_hyperparameter_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'proxy_nca' has no hyper-parameter margin; it has scale"):
        losses.create("proxy_nca", margin=0.1)
