"""ConvNeXt, SigLIP and SwiGLU against timm's models, made small, with weights made by a rule."""

from functools import partial
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax.models import BACKBONES, convnext, create_backbone, pretrained
from dml_jax.models.embedder import Embedder
from dml_jax.models.normalisation import InputNormalisation
from tests.helpers import weights

GOLDEN = np.load(weights.GOLDEN / "timm.npz")
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # From Flax's layout to PyTorch's.
RAW = {"input_normalisation": InputNormalisation((0.0,) * 3, (1.0,) * 3, "rgb")}
# Of each kind of layer one case is fast.
FAST = ("convnext_tiny 64", "vit_base_patch32_siglip 160", "vit_giant_patch14_dinov2 98")
CASES = [
    pytest.param(name, size, marks=() if f"{name} {size}" in FAST else pytest.mark.slow)
    for name, reduced in weights.REDUCED.items()
    for size in reduced[-1]
]


def small_parameters(name):
    """Returns the parameters of a backbone of `REDUCED`, converted from tensors by timm's names."""
    _, options, _, _ = weights.REDUCED[name]
    backbone = create_backbone(name, **options)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(partial(backbone.init, train=False), jax.random.key(0), image)
    shapes = timms(jax.tree.map(lambda x: np.broadcast_to(0, x.shape), params["params"]))
    tensors = {key: weights.vit_tensor(key, x.shape) for key, x in shapes.items()}
    classifier = {"head.fc.weight": np.ones((1000, 8), np.float32)}
    made = {name: partial(BACKBONES.get(name), **options)}
    with mock.patch.dict(BACKBONES._parts, made):
        return pretrained.convert(name, tensors | classifier)["params"]


def timms(params):
    """Returns parameters by timm's names and in PyTorch's layout."""
    leaves = {"kernel": "weight", "scale": "weight"}
    return {
        ".".join((*path[:-1], leaves.get(path[-1], path[-1]))): np.transpose(
            x, AXES.get(x.ndim, range(x.ndim))
        )
        for path, x in flax.traverse_util.flatten_dict(params).items()
    }


def pooling_of(name):
    return "gap" if name.startswith("convnext") or name.endswith("gap") else "token"


def pooling_function(name, size, dtype="float32"):
    """Returns a function from parameters to the pooled features of the golden images."""
    backbone = create_backbone(name, dtype=dtype, **weights.REDUCED[name][1] | RAW)
    images, features = jnp.asarray(weights.vit_images(size)), 8 * 8 if "conv" in name else 48
    embedder = Embedder(backbone=backbone, pooling=pooling_of(name), dim=features)
    head = {"kernel": jnp.eye(features), "bias": jnp.zeros(features)}

    def pooled(params):
        variables = {"params": {"backbone": params, "head": head}}
        return embedder.apply(variables, images, train=True)

    return pooled


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_features_and_gradients_equal_timms(name, size):
    function = pooling_function(name, size)

    def objective(params):
        pooled = function(params)
        return jnp.sum(pooled * jnp.cos(jnp.arange(pooled.shape[1], dtype="f4"))[None]), pooled

    gradients, pooled = jax.jit(jax.grad(objective, has_aux=True))(small_parameters(name))
    gradients = timms(gradients)
    assert error(pooled, GOLDEN[f"{name} {size} pooled"]) < 1e-5
    expected = GOLDEN[f"{name} {size} gradients"]
    assert weights.samples(gradients).shape == expected.shape
    start = 0
    for key in sorted(gradients):
        ours = weights.samples({key: gradients[key]})
        theirs, start = expected[start : start + ours.size], start + ours.size
        # Softmax ignores the bias of the keys; its gradient is 0 up to rounding.
        difference = np.linalg.norm(ours - theirs)
        assert difference < 1e-4 * (np.linalg.norm(theirs) + 1e-2), (key, difference)


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_base_patch32_siglip"])
def test_in_bfloat16_features_differ_by_its_rounding(name):
    size = weights.REDUCED[name][-1][-1]
    pooled = jax.jit(pooling_function(name, size, dtype="bfloat16"))(small_parameters(name))
    assert pooled.dtype == jnp.float32
    assert 1e-4 < error(pooled, GOLDEN[f"{name} {size} pooled"]) < 0.02


@pytest.mark.parametrize("name", convnext.VARIANTS)
def test_the_number_of_parameters_is_timms(name):
    backbone = create_backbone(name)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(partial(backbone.init, train=False), jax.random.key(0), image)
    parameters, _ = GOLDEN[f"sizes {name}"]
    assert sum(x.size for x in jax.tree.leaves(variables)) == parameters


@pytest.mark.parametrize(
    ("name", "size"),
    [("convnext_tiny", 224), ("vit_base_patch32_siglip", 256)],
)
def test_the_number_of_operations_is_timms(name, size):
    """Up to those of normalisations and activations, which PyTorch's number leaves out.

    XLA counts one round of the loops of depthwise convolutions.
    """
    backbone = create_backbone(name)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(partial(backbone.init, train=False), jax.random.key(0), image)
    lowered = jax.jit(partial(backbone.apply, train=False)).lower(variables, image)
    _, operations = GOLDEN[f"sizes {name}"]
    assert abs(lowered.cost_analysis()["flops"] / operations - 1) < 0.05


def test_parts_of_convnext_are_the_whole_network():
    backbone = create_backbone("convnext_tiny", **weights.REDUCED["convnext_tiny"][1])
    params = small_parameters("convnext_tiny")
    assert backbone.parts == ("stem", "stages.0", "stages.1", "stages.2", "stages.3")
    x = images = jnp.asarray(weights.vit_images(64))
    whole = backbone.apply({"params": params}, images, train=False)
    for parts in (backbone.parts[:1], backbone.parts[1:3], backbone.parts[3:]):
        x = backbone.apply({"params": params}, x, train=False, parts=parts)
    np.testing.assert_allclose(x, whole, rtol=1e-5, atol=1e-5)


def test_images_too_small_for_convnext_are_refused():
    with pytest.raises(ValueError, match="cannot reduce images of 31x40 pixels by 32; choose 32"):
        create_backbone("convnext_tiny").check_image_size(31, 40)
