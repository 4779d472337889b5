import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dml_jax.models import depthwise


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("shape", [(3, 9, 12, 5), (2, 2, 3, 4)])
def test_a_depthwise_convolution_and_its_gradients_are_xlas(shape, dtype, tolerance):
    """Also of maps smaller than the kernel."""
    ours = depthwise.convolution(shape[-1], 7, dtype=dtype, name="conv")
    theirs = nn.Conv(shape[-1], (7, 7), padding=3, feature_group_count=shape[-1])
    x, weights = jax.random.normal(jax.random.key(0), (2, *shape)).astype(dtype)
    kernel, bias = jax.random.normal(jax.random.key(1), (49, shape[-1])), jnp.ones(shape[-1])
    params = {"kernel": kernel.reshape(7, 7, 1, -1), "bias": bias}

    def results(layer, x, weights):
        def objective(params, x):
            y = layer.apply({"params": params}, x)
            return jnp.sum((weights * y).astype(jnp.float32)), y

        return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)

    found = results(ours, x, weights)
    assert found[1].dtype == dtype
    expected = results(theirs, x.astype(jnp.float32), weights.astype(jnp.float32))
    for params, _ in (found[0], expected[0]):
        del params["bias"]  # Flax sums its gradient, in bfloat16.
    for y, z in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(y - z) < tolerance * jnp.linalg.norm(z)
