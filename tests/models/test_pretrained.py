import json
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dml_jax.models import create_backbone, pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "backbone_state_dicts.json").read_text())
NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "bninception")


def tensor(key, shape):
    """The weights that the reference features were computed with."""
    seed = np.random.RandomState(zlib.crc32(key.encode()))
    x = seed.standard_normal(shape).astype("float32")
    if key.endswith("running_var"):
        return 1 + 0.1 * abs(x)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * x
    if len(shape) == 1:
        return 1 + 0.1 * x
    return x * np.float32((2 / np.prod(shape[1:])) ** 0.5)


@pytest.fixture
def state_dict():
    return {key: np.zeros(shape, np.float32) for key, shape in SHAPES["resnet18"].items()}


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_pytorch(name):
    golden = np.load(GOLDEN / "backbones.npz")
    weights = {key: tensor(key, shape) for key, shape in SHAPES[name].items()}
    variables = pretrained.convert(name, weights)
    images = jnp.asarray(golden["images_nchw"].transpose(0, 2, 3, 1))
    backbone = create_backbone(name)
    features = jax.jit(lambda v, x: backbone.apply(v, x, train=False))(variables, images)
    for pooled, suffix in ((features.mean((1, 2)), "gap"), (features.max((1, 2)), "gmp")):
        reference = golden[f"{name}_{suffix}"]
        assert np.linalg.norm(pooled - reference) < 1e-4 * np.linalg.norm(reference)


def test_classifier_and_counters_are_left_out(state_dict):
    state_dict["bn1.num_batches_tracked"] = np.int64(7)
    variables = pretrained.convert("resnet18", state_dict)
    names = {"/".join(str(key.key) for key in path) for path, _ in _leaves(variables)}
    assert "params/layer1.0/conv1/kernel" in names
    assert "batch_stats/layer2.0/downsample.1/var" in names
    assert not any("fc" in name or "num_batches" in name for name in names)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_every_tensor_that_does_not_fit_is_listed(state_dict):
    del state_dict["bn1.weight"], state_dict["layer1.0.conv1.weight"]
    state_dict["layer9.weight"] = np.zeros(3, np.float32)
    state_dict["conv1.weight"] = np.zeros((64, 3, 3, 5), np.float32)
    state_dict["bn1.bias"] = np.zeros(32, np.float32)
    with pytest.raises(ValueError, match="these are no weights of resnet18") as error:
        pretrained.convert("resnet18", state_dict)
    assert re.split("; |: ", str(error.value))[1:] == [
        "bn1.bias is [32], but should be [64]",
        "bn1.weight is missing",
        "conv1.weight is [64, 3, 3, 5], but should be [64, 3, 7, 7]",
        "layer1.0.conv1.weight is missing",
        "layer9.weight is unexpected",
    ]


def test_weights_of_another_backbone_are_refused(state_dict):
    with pytest.raises(ValueError, match="layer1.0.conv3.weight is missing"):
        pretrained.convert("resnet50", state_dict)


def test_converted_weights_are_copies(state_dict):
    variables = pretrained.convert("resnet18", state_dict)
    state_dict["bn1.weight"][:] = 5
    assert (variables["params"]["bn1"]["scale"] == 0).all()
