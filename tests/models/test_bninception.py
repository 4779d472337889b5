import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dml_jax.models import create_backbone, layers

PADDINGS = [((1, 1), (1, 1)), ((0, 1), (0, 0))]


def shapes(size):
    backbone = create_backbone("bninception")
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    features, _ = jax.eval_shape(
        lambda x: backbone.init_with_output(jax.random.key(0), x, train=False), image
    )
    return features.shape


@pytest.mark.parametrize("size", [(32, 64), (224, 223), (230, 224)])
def test_feature_map_is_a_32nd_of_the_image(size):
    assert shapes(size) == (2, size[0] // 32, round(size[1] / 32), 1024)


@pytest.mark.parametrize("size", [(80, 64), (64, 222), (64, 231), (16, 64), (1, 1)])
def test_an_invalid_image_size_raises(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels.*multiples of 32"):
        shapes(size)


def test_input_is_bgr_minus_the_means_of_caffe():
    red, green, blue = 130, 7, 9
    image = jnp.array([red, green, blue], jnp.uint8).reshape(1, 1, 1, 3)
    normalised = create_backbone("bninception").input_normalisation.normalise(image)
    assert normalised.ravel().tolist() == [9 - 104, 7 - 117, 130 - 128]


def test_frozen_statistics_do_not_change_and_variables_are_float32_with_bfloat16():
    backbone = create_backbone("bninception", freeze_bn=True, dtype="bfloat16")
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    # Flax raises an error for an update of statistics that are not mutable.
    features = jax.eval_shape(lambda v: backbone.apply(v, images, train=True), variables)
    assert features.dtype == jnp.bfloat16


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """The platform whose branch of the pools is taken."""
    if request.param == "tpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, tpu, default: tpu(x))


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", PADDINGS)
def test_max_pool_and_its_gradient_equal_those_of_xla(padding, stride):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    weights = jax.random.normal(
        jax.random.key(1), layers.max_pool(x, stride, padding=padding).shape
    )

    def ours(x):
        return (weights * layers.max_pool(x, stride, padding=padding)).sum()

    def expected(x):
        return (weights * nn.max_pool(x, (3, 3), (stride, stride), padding=padding)).sum()

    for function in (lambda f: f, jax.grad):
        np.testing.assert_allclose(function(ours)(x), function(expected)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("platform")
def test_average_pool_uses_zero_padding():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    expected = nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=True)
    np.testing.assert_allclose(layers.average_pool(x), expected, rtol=1e-5, atol=1e-6)
