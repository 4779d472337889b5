import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dml_jax._utils import numerics


@given(st.integers(0, 1000), st.floats(-30, 30))
def test_normalize_gives_unit_vectors_at_every_scale(seed, exponent):
    vectors = np.random.default_rng(seed).normal(size=(3, 5)) * 10.0**exponent
    unit = numerics.normalize(jnp.asarray(vectors, jnp.float32))
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    if exponent > -11:
        chex.assert_trees_all_close(unit, expected.astype(np.float32), atol=1e-6)
    chex.assert_tree_all_finite(unit)


def test_normalize_gradient_equals_that_of_the_direct_formula():
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)

    def direct(v):
        return jnp.sum(weights * v / jnp.linalg.norm(v, axis=-1, keepdims=True))

    ours = jax.grad(lambda v: jnp.sum(weights * numerics.normalize(v)))(vectors)
    chex.assert_trees_all_close(ours, jax.grad(direct)(vectors), atol=1e-6)


def test_normalize_keeps_zero_with_a_finite_gradient():
    zero = jnp.zeros((2, 3))
    chex.assert_trees_all_equal(numerics.normalize(zero), zero)
    gradient = jax.grad(lambda v: numerics.normalize(v).sum())(zero)
    chex.assert_tree_all_finite(gradient)
    assert jnp.abs(gradient).max() <= 1


def test_inner_products_have_float32_accuracy():
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(3, 512)), rng.normal(size=(4, 512))
    ours = numerics.inner_products(
        jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
    )
    chex.assert_trees_all_close(ours, (rows @ columns.T).astype(np.float32), atol=1e-4)
