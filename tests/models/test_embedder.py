import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax.models import create_embedder
from dml_jax.models.normalisation import InputNormalisation

OPTIONS = {"backbone": "resnet18", "width": 4, "stem": "small"}


@pytest.fixture(scope="module")
def images():
    return jax.random.randint(jax.random.key(1), (3, 16, 16, 3), 0, 256).astype(jnp.uint8)


@pytest.fixture(scope="module")
def variables(images):
    embedder = create_embedder(pooling="gap", dim=8, **OPTIONS)
    return jax.jit(lambda: embedder.init(jax.random.key(0), images, train=False))()


def embed(variables, images, **options):
    embedder = create_embedder(**{"pooling": "gap", "dim": 8, **OPTIONS, **options})
    return jax.jit(lambda v, x: embedder.apply(v, x, train=False))(variables, images)


def test_embedding_is_head_of_pooled_backbone_of_normalised_images(images, variables):
    embedder = create_embedder(pooling="gmp", dim=8, **OPTIONS)
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    normalised = (images.astype(jnp.float32) / 255 - mean[None, None]) / std[None, None]
    bare = {collection: tree["backbone"] for collection, tree in variables.items()}
    features = jax.jit(lambda v, x: embedder.backbone.apply(v, x, train=False))(bare, normalised)
    head = variables["params"]["head"]
    expected = features.max((1, 2)) @ head["kernel"] + head["bias"][None]
    ours = embed(variables, images, pooling="gmp")
    assert ours.shape == (3, 8)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_uint8_and_float_images_are_alike(images, variables):
    ours = embed(variables, images)
    np.testing.assert_array_equal(ours, embed(variables, images.astype(jnp.float32)))


def test_sum_of_poolings(images, variables):
    gap, gmp, both = (embed(variables, images, pooling=p) for p in ("gap", "gmp", "gap+gmp"))
    bias = variables["params"]["head"]["bias"][None]
    np.testing.assert_allclose(both, gap + gmp - bias, rtol=1e-4, atol=1e-5)


def test_normalisation_reorders_channels_for_bgr_backbones():
    caffe = InputNormalisation(mean=(104, 117, 128), std=(1, 1, 2), channels="BGR")
    red, green, blue = 130, 7, 9
    image = jnp.array([red, green, blue], jnp.uint8).reshape(1, 1, 1, 3)
    assert caffe.normalise(image).ravel().tolist() == [9 - 104, 7 - 117, 1]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(images):
    embedder = create_embedder(pooling="gap", dim=8, dtype="bfloat16", **OPTIONS)
    embeddings, variables = jax.jit(
        lambda: embedder.init_with_output(jax.random.key(0), images, train=False)
    )()
    assert {leaf.dtype for leaf in jax.tree.leaves((embeddings, variables))} == {jnp.float32}

    bare = {collection: tree["backbone"] for collection, tree in variables.items()}
    features, updates = jax.jit(
        lambda v, x: embedder.backbone.apply(v, x, train=True, mutable=["batch_stats"])
    )(bare, images.astype(jnp.float32) / 255)
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.float32}

    reference = embed(variables, images)
    assert (embeddings != reference).any()
    np.testing.assert_allclose(embeddings, reference, atol=0.02 * float(abs(reference).max()))


def test_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown pooling 'max': choose one of gap, gmp"):
        create_embedder(pooling="max", dim=8, **OPTIONS)
