import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dml_jax.models import Embedder, create_backbone, create_embedder, resnet
from dml_jax.models import embedder as embedder_module
from dml_jax.models.embedder import trainable_from
from dml_jax.models.normalisation import CLIP, IMAGENET, InputNormalisation


def make(*, pooling="gap", **options):
    tiny = {"stage_sizes": (1, 1), "bottleneck": False, "width": 4, "stem": "small"}
    return Embedder(backbone=resnet.ResNet(**tiny, **options), pooling=pooling, dim=8)


@pytest.fixture(scope="module")
def images():
    return jax.random.randint(jax.random.key(1), (3, 16, 16, 3), 0, 256).astype(jnp.uint8)


@pytest.fixture(scope="module")
def variables(images):
    embedder = make()
    return jax.jit(lambda x: embedder.init(jax.random.key(0), x, train=False))(images)


def embed(variables, images, **options):
    embedder = make(**options)
    return jax.jit(lambda v, x: embedder.apply(v, x, train=False))(variables, images)


def test_embedding_is_head_of_pooled_backbone_of_normalised_images(images, variables):
    embedder = make(pooling="gmp")
    mean, std = np.float32([[[[0.485, 0.456, 0.406]]], [[[0.229, 0.224, 0.225]]]])
    normalised = (images.astype(jnp.float32) / 255 - mean[None]) / std[None]
    bare = {collection: tree["backbone"] for collection, tree in variables.items()}
    features = jax.jit(lambda v, x: embedder.backbone.apply(v, x, train=False))(bare, normalised)
    head = variables["params"]["head"]
    expected = features.max((1, 2)) @ head["kernel"] + head["bias"][None]
    ours = embed(variables, images, pooling="gmp")
    assert ours.shape == (3, 8)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_uint8_and_float_images_give_equal_embeddings(images, variables):
    ours = embed(variables, images)
    np.testing.assert_array_equal(ours, embed(variables, images.astype(jnp.float32)))


def test_sum_of_poolings(images, variables):
    gap, gmp, both = (embed(variables, images, pooling=p) for p in ("gap", "gmp", "gap+gmp"))
    bias = variables["params"]["head"]["bias"][None]
    np.testing.assert_allclose(both, gap + gmp - bias, rtol=1e-4, atol=1e-5)


def test_the_generalised_mean_and_its_learned_exponent(images):
    """At p = 1 the mean, for a large p the maximum; equation 2 of arXiv 1711.02512."""
    embedder = make(pooling="gem")
    init = jax.jit(lambda x: embedder.init(jax.random.key(0), x, train=False))
    variables = init(images)
    assert variables["params"]["gem"]["p"].tolist() == [3.0]
    x = jax.random.normal(jax.random.key(2), (2, 4, 5, 3))

    def pooled(p):
        return embedder_module.GeM().apply({"params": {"p": jnp.array([p], jnp.float32)}}, x)

    positive = np.maximum(np.asarray(x, np.float64), 1e-6)
    for p in (1.0, 2.5, 3.0):
        expected = np.mean(positive**p, axis=(1, 2)) ** (1 / p)
        np.testing.assert_allclose(pooled(p), expected, rtol=1e-5)
    np.testing.assert_allclose(pooled(60.0), positive.max((1, 2)), rtol=0.06)
    slope = jax.grad(lambda p: pooled(p).sum())(3.0)
    numeric = [np.sum(np.mean(positive**p, axis=(1, 2)) ** (1 / p)) for p in (3.001, 2.999)]
    np.testing.assert_allclose(slope, (numeric[0] - numeric[1]) / 0.002, rtol=1e-3)
    # A frozen backbone pools in the other part of the network.
    split = embedder.clone(train_from="head")
    frozen = jax.jit(lambda v, x: split.apply(v, x, method="frozen"))(variables, images)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        frozen @ head["kernel"] + head["bias"][None],
        embed(variables, images, pooling="gem"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gradient_of_maximum_pooling_goes_to_the_maximum():
    features = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    gradient = jax.grad(lambda x: embedder_module._maximum(x).sum())(features)
    expected = features == features.max((1, 2), keepdims=True)
    np.testing.assert_array_equal(gradient, expected)


def test_normalisation_reorders_channels_for_bgr_backbones():
    caffe = InputNormalisation(mean=(104, 117, 128), std=(1, 1, 2), channels="bgr")
    red, green, blue = 130, 7, 9
    image = jnp.array([red, green, blue], jnp.uint8).reshape(1, 1, 1, 3)
    assert caffe.normalise(image).ravel().tolist() == [9 - 104, 7 - 117, 1]


def test_a_normalisation_is_chosen_by_name(images):
    def input_of(**options):
        embedder = create_embedder(backbone="conv4", pooling="gap", dim=8, **options)
        return embedder.backbone.input_normalisation

    assert input_of() == input_of(normalisation="imagenet") == IMAGENET
    half = input_of(normalisation="inception")
    ends = half.normalise(jnp.array([0, 255, 51], jnp.uint8).reshape(1, 1, 1, 3))
    np.testing.assert_allclose(ends.ravel(), [-1, 1, -0.6], rtol=1e-6)
    bgr = input_of(normalisation="clip", channels="bgr")
    assert bgr == CLIP._replace(channels="bgr")
    # The means and deviations that CLIP's and Hugging Face's configs publish, in units of 0..1.
    published = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for ours, theirs in zip((CLIP.mean, CLIP.std), published, strict=True):
        np.testing.assert_allclose(ours, 255 * np.array(theirs), rtol=1e-7)
    vits = create_embedder(backbone="vit_base_patch32_clip", pooling="token", dim=8)
    assert vits.backbone.input_normalisation == CLIP


@pytest.mark.parametrize("backbone", ["resnet6", "conv4", "bninception"])
def test_the_channel_order_does_not_change_the_order_of_the_means(backbone, images):
    made = {
        channels: create_embedder(backbone=backbone, pooling="gap", dim=8, channels=channels)
        for channels in (None, "rgb", "bgr")
    }
    inputs = {
        channels: one.backbone.input_normalisation.normalise(images)
        for channels, one in made.items()
    }
    default = "bgr" if backbone == "bninception" else "rgb"
    np.testing.assert_array_equal(inputs[None], inputs[default])
    flipped = made["rgb"].backbone.input_normalisation.normalise(images[..., ::-1])
    np.testing.assert_array_equal(inputs["bgr"], flipped)
    assert (inputs["bgr"] != inputs["rgb"]).any()


def test_channels_bgr_reproduces_the_official_input_of_resnets(images):
    """The official programs swap the channels of ResNets, but not torchvision's means."""
    embedder = create_embedder(backbone="resnet6", pooling="gap", dim=8, channels="bgr")
    theirs = np.asarray(images)[..., ::-1].astype(np.float32) / 255
    theirs = (theirs - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    ours = embedder.backbone.input_normalisation.normalise(images)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_activations_with_float32_variables_and_embeddings(images):
    embedder = make(dtype="bfloat16")
    embeddings, variables = jax.jit(
        lambda x: embedder.init_with_output(jax.random.key(0), x, train=False)
    )(images)
    assert {leaf.dtype for leaf in jax.tree.leaves((embeddings, variables))} == {
        jnp.dtype("float32")
    }

    bare = {collection: tree["backbone"] for collection, tree in variables.items()}
    features, updates = jax.jit(
        lambda v, x: embedder.backbone.apply(v, x, train=True, mutable=["batch_stats"])
    )(bare, images.astype(jnp.float32) / 255)
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}

    reference = embed(variables, images)
    assert (embeddings != reference).any()
    np.testing.assert_allclose(embeddings, reference, atol=0.02 * float(abs(reference).max()))


def init_head(images, **options):
    embedder = Embedder(backbone=resnet.ResNet((1, 1), bottleneck=False, width=8), **options)
    variables = jax.jit(lambda x: embedder.init(jax.random.key(5), x, train=False))(images)
    return jax.tree.map(np.asarray, variables["params"]["head"])


def test_the_head_is_initialised_like_pytorchs_linear_layer(images):
    head = init_head(images, pooling="gap", dim=4096)
    features = head["kernel"].shape[0]
    bound = features**-0.5
    for values in (head["kernel"], head["bias"]):
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.99 * bound
        # Five standard deviations of the standard deviation and of the mean of a uniform sample.
        spread = bound / 3**0.5
        assert abs(values.std() / spread - 1) < 5 * (0.2 / values.size) ** 0.5
        assert abs(values.mean()) < 5 * spread / values.size**0.5
        assert scipy.stats.kstest(values.ravel(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    assert np.abs(np.corrcoef(head["kernel"], head["bias"][None])[-1, :-1]).max() < 0.1


def test_the_head_of_proxy_anchor_is_kaiming_normal_by_fan_out_with_zero_bias(images):
    head = init_head(images, pooling="gap", dim=4096, head_init="kaiming_fan_out")
    assert not head["bias"].any()
    spread = (2 / 4096) ** 0.5
    assert scipy.stats.kstest(head["kernel"].ravel(), scipy.stats.norm(0, spread).cdf).pvalue > 1e-3


def test_an_unknown_head_init_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown head_init 'zero': choose one of uniform, kaim"):
        create_embedder(backbone="resnet18", pooling="gap", dim=8, head_init="zero")


def test_an_unknown_pooling_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown pooling 'max': choose one of gap, gmp"):
        create_embedder(backbone="resnet18", pooling="max", dim=8)


def test_options_reach_the_backbone():
    embedder = create_embedder(
        backbone="resnet34",
        pooling="gmp",
        dim=5,
        width=8,
        stem="small",
        freeze_bn=True,
        dtype="bfloat16",
    )
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    embeddings, variables = jax.eval_shape(
        lambda x: embedder.init_with_output(jax.random.key(0), x, train=False), images
    )
    assert embeddings.shape == (2, 5)
    assert variables["params"]["head"]["kernel"].shape == (64, 5)
    assert (embedder.backbone.freeze_bn, embedder.backbone.dtype) == (True, "bfloat16")


@pytest.mark.parametrize("backbone", ["resnet6", "conv4", "conv1"])
def test_the_frozen_and_the_trained_part_make_the_whole_network(backbone, images):
    options = {"backbone": backbone, "pooling": "gap+gmp", "dim": 8, "width": 4}
    whole = create_embedder(**options)
    variables = jax.jit(lambda x: whole.init(jax.random.key(0), x, train=False))(images)
    expected = jax.jit(lambda v, x: whole.apply(v, x, train=False))(variables, images)
    choices = trainable_from(whole.backbone)
    assert choices[0] == "all" and choices[-1] == "head"
    assert len(choices) == {"resnet6": 4, "conv4": 5, "conv1": 2}[backbone]
    for train_from in choices:
        split = create_embedder(**options, train_from=train_from)
        chex.assert_trees_all_equal(
            jax.jit(lambda x, split=split: split.init(jax.random.key(0), x, train=False))(images),
            variables,
        )

        @jax.jit
        def parts(v, x, split=split):
            features = split.apply(v, x, method="frozen")
            return features, split.apply(v, features, train=False, method="trained")

        features, ours = parts(variables, images)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert features.ndim == (2 if train_from == "head" else 4)


def test_every_part_of_a_backbone_has_its_own_parameters():
    for name in ("resnet50", "bninception", "conv4"):
        backbone = create_backbone(name)
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        init = functools.partial(backbone.init, train=False)
        whole = jax.eval_shape(init, jax.random.key(0), image)["params"]
        x, found = image, []
        for part in backbone.parts:
            x, variables = jax.eval_shape(
                functools.partial(backbone.init_with_output, train=False, parts=[part]),
                jax.random.key(0),
                x,
            )
            found += list(variables["params"])
        assert sorted(found) == sorted(whole)


def test_a_part_that_the_backbone_lacks_is_an_error():
    with pytest.raises(ValueError, match="unknown train_from 'layer9': choose one of all"):
        create_embedder(backbone="resnet6", pooling="gap", dim=8, train_from="layer9")
