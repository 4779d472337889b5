import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax.models import create_backbone, resnet

# Compiles in a second.
TINY = {"stage_sizes": (1, 1), "bottleneck": False, "width": 4, "stem": "small"}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 16, 16, 3))


def initialise(backbone, images):
    return jax.jit(lambda x: backbone.init(jax.random.key(0), x, train=False))(images)


def shapes(name, size, **options):
    backbone = create_backbone(name, **options)
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(
        lambda x: backbone.init_with_output(jax.random.key(0), x, train=False), image
    )
    return features.shape, variables["params"]


@pytest.mark.parametrize(
    ("name", "size", "options", "expected"),
    [
        ("resnet18", 64, {}, (2, 2, 2, 512)),
        ("resnet18", 65, {}, (2, 3, 3, 512)),
        ("resnet50", 64, {"width": 16}, (2, 2, 2, 512)),
        ("resnet18", 32, {"width": 16, "stem": "small"}, (2, 2, 2, 128)),
        ("resnet34", 48, {"width": 8, "stem": "small"}, (2, 3, 3, 64)),
    ],
)
def test_feature_map_has_the_expected_shape(name, size, options, expected):
    assert shapes(name, size, **options)[0] == expected


def test_shortcuts_have_a_convolution_only_if_the_shape_changes():
    _, basic = shapes("resnet18", 32)
    _, bottleneck = shapes("resnet50", 32)
    assert "downsample.0" not in basic["layer1.0"]
    assert basic["layer2.0"]["downsample.0"]["kernel"].shape == (1, 1, 64, 128)
    assert bottleneck["layer1.0"]["downsample.0"]["kernel"].shape == (1, 1, 64, 256)
    assert "downsample.0" not in bottleneck["layer1.1"]


def test_initialisation_equals_that_of_torchvision(images):
    variables = initialise(resnet.ResNet(**{**TINY, "width": 32}), images)
    block = variables["params"]["layer2.0"]
    # Kaiming normal by fan-out: variance 2 / (3 * 3 * 64).
    np.testing.assert_allclose(block["conv1"]["kernel"].std(), (2 / 576) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(block["conv1"]["kernel"].mean(), 0, atol=0.002)
    assert (block["bn2"]["scale"] == 1).all()
    assert (block["bn2"]["bias"] == 0).all()


def gradients(backbone, variables, images):
    def loss(params):
        features, updates = backbone.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return (features**2).mean(), updates["batch_stats"]

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


def test_running_statistics_have_momentum_0_9(images):
    backbone = resnet.ResNet(**TINY)
    variables = initialise(backbone, images)
    _, batch_stats = gradients(backbone, variables, images)
    x = jax.lax.conv_general_dilated(
        images,
        variables["params"]["conv1"]["kernel"],
        (2, 2),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(batch_stats["bn1"]["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(batch_stats["bn1"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


def test_frozen_statistics_do_not_change_while_scale_and_bias_train(images):
    backbone = resnet.ResNet(freeze_bn=True, **TINY)
    variables = initialise(backbone, images)
    grads, batch_stats = gradients(backbone, variables, images)
    jax.tree.map(np.testing.assert_array_equal, batch_stats, variables["batch_stats"])
    for layer in (grads["bn1"], grads["layer2.0"]["bn2"]):
        assert (layer["scale"] != 0).any()
        assert (layer["bias"] != 0).any()
    training, _ = backbone.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(training, backbone.apply(variables, images, train=False))


def test_an_unknown_stem_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown stem 'big': choose one of imagenet, small"):
        create_backbone("resnet18", stem="big")


def test_an_unknown_backbone_raises_and_lists_the_known_ones():
    known = "resnet18, resnet34, resnet50, resnet101"
    with pytest.raises(ValueError, match=f"unknown backbone 'vgg'; choose one of .*{known}"):
        create_backbone("vgg")


def test_an_unknown_option_raises():
    with pytest.raises(TypeError, match="depth"):
        create_backbone("resnet18", depth=3)
