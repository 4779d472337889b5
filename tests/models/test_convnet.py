import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dml_jax.models import create_backbone


def test_features_equal_those_of_explicit_operations():
    backbone = create_backbone("conv4", width=8)
    images = jax.random.normal(jax.random.key(0), (2, 35, 32, 3))
    features, variables = jax.jit(
        lambda x: backbone.init_with_output(jax.random.key(1), x, train=False)
    )(images)
    expected = images
    for block in range(1, 5):
        kernel = variables["params"][f"conv{block}"]["kernel"]
        numbers = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(
            expected, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        # The initial running statistics are 0 and 1.
        expected = nn.max_pool(nn.relu(expected / (1 + 1e-5) ** 0.5), (2, 2), (2, 2))
    assert features.shape == (2, 2, 2, 8)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_frozen_statistics_do_not_change():
    backbone = create_backbone("conv4", width=4, freeze_bn=True)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = backbone.init(jax.random.key(1), images, train=False)
    trained, updates = backbone.apply(variables, images, train=True, mutable=["batch_stats"])
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates), strict=True
    ):
        assert (jnp.asarray(before) == after).all()
    np.testing.assert_array_equal(trained, backbone.apply(variables, images, train=False))
