import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax.models import linear


def random(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


def gradients(module, variables, x, cotangent):
    def product(params, x):
        y = module.apply({"params": params}, x)
        return jnp.sum(y * cotangent.astype(y.dtype))

    return jax.grad(product, argnums=(0, 1))(variables["params"], x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(9, 3, 1), (10, 3, 2), (17, 7, 2), (8, 1, 2)]
)
def test_a_convolution_and_its_gradients_equal_those_of_flax(side, kernel, stride, bias):
    options = {"padding": kernel // 2, "use_bias": bias}
    ours = linear.Conv(6, kernel, stride, **options)
    theirs = nn.Conv(6, (kernel, kernel), stride, **options)
    x = random(0, 3, side, side, 5)
    variables = ours.init(jax.random.key(1), x)
    expected, shape = theirs.apply(variables, x), theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, shape)
    np.testing.assert_array_equal(ours.apply(variables, x), expected)
    cotangent = random(2, *expected.shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradients(ours, variables, x, cotangent),
        gradients(theirs, variables, x, cotangent),
    )


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5)])
def test_a_linear_layer_and_its_gradients_equal_those_of_flax(shape):
    ours, theirs = linear.Dense(6), nn.Dense(6)
    x = random(0, *shape)
    variables = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), x))
    expected = theirs.apply(variables, x)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-5, atol=1e-6)
    cotangent = random(2, *expected.shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        gradients(ours, variables, x, cotangent),
        gradients(theirs, variables, x, cotangent),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (linear.Conv(6, 3, 2, padding=1, dtype="bfloat16"), nn.Conv(6, (3, 3), 2, 1), (8, 9, 9, 5)),
        (linear.Conv(6, 3, padding=1, dtype="bfloat16"), nn.Conv(6, (3, 3), 1, 1), (8, 2, 2, 5)),
        (linear.Dense(6, dtype="bfloat16"), nn.Dense(6), (8, 20, 5)),
    ],
    ids=["convolution", "unfolded", "linear"],
)
def test_gradients_of_parameters_are_not_rounded_to_bfloat16(ours, theirs, shape):
    x = random(0, *shape).astype("bfloat16")
    variables = ours.init(jax.random.key(1), x)
    result = ours.apply(variables, x)
    assert result.dtype == "bfloat16"
    # Numbers that bfloat16 holds exactly, so that only the sums can be rounded.
    cotangent = random(2, *result.shape).astype("bfloat16")
    exact = gradients(theirs, variables, x.astype("float32"), cotangent.astype("float32"))[0]
    rounded = gradients(theirs.clone(dtype="bfloat16"), variables, x, cotangent)[0]

    def errors(found):
        return jax.tree.map(lambda a, b: float(np.abs(a / b - 1).max()), found, exact)

    found = gradients(ours, variables, x, cotangent)
    assert found[1].dtype == "bfloat16"
    for name, error in errors(found[0]).items():
        assert error < 1e-2 * errors(rounded)[name]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 3)])
def test_convolution_of_small_maps_equals_that_of_xla(shape, stride):
    x, kernel = random(0, 2, *shape, 5), random(1, 3, 3, 5, 7)
    padding = ((1, 1), (1, 1))
    ours = linear._unfold_or_convolve(x, kernel, stride, padding)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_convolution_of_small_maps_is_lowered_to_a_matrix_product():
    def lowered(size):
        images = jax.ShapeDtypeStruct((2, size, size, 5), jnp.float32)
        kernel = jax.ShapeDtypeStruct((3, 3, 5, 7), jnp.float32)
        function = jax.jit(lambda x, k: linear._unfold_or_convolve(x, k, 1, ((1, 1), (1, 1))))
        return function.lower(images, kernel).as_text()

    assert "convolution" not in lowered(2)
    assert "convolution" in lowered(3)
