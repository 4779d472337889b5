import json
import re
import shutil
import struct
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from safetensors.numpy import save_file

from dml_jax._utils import hub, sharding
from dml_jax.models import pretrained
from dml_jax.models.normalisation import IMAGENET, INCEPTION
from dml_jax.training import builder
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny, weights
from tests.helpers.fuzz import damaged

NAMES = (
    "resnet18",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("resnet34", "resnet50", "resnet101")),
    "bninception",
)
BACKBONE_DEFAULTS = {"model__width": None, "model__stem": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def state_dict():
    return {key: np.zeros(shape, np.float32) for key, shape in weights.SHAPES["resnet18"].items()}


def pixels(name):
    """Returns RGB images in 0..255 that the backbone normalises to the golden images."""
    golden = np.load(weights.GOLDEN / "backbones.npz")["images_nchw"].transpose(0, 2, 3, 1)
    if name == "bninception":
        return (golden + np.float32([104, 117, 128]))[..., ::-1]
    mean, std = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return 255 * (golden * std + mean)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_loads_the_file_and_reproduces_pytorchs_features(name, images, tmp_path):
    file = tmp_path / f"{name}.safetensors"
    tensors = weights.state_dict(name)
    save_file(pretrained.from_port(weights.port(name)) if name == "bninception" else tensors, file)
    assert_golden_features(name, file, images)


def test_an_old_state_dict_of_a_parallel_model_is_converted_to_the_current_format():
    old = weights.port("bninception") | {"module.conv1_7x7_s2_bn.num_batches_tracked": np.int64(3)}
    name = "module.inception_3a_3x3.weight"
    old[name] = np.asfortranarray(old[name])
    plain, expected = pretrained.from_port(old), weights.backbone("bninception")
    assert plain.keys() == expected.keys()
    for key, array in plain.items():
        np.testing.assert_array_equal(array, expected[key], strict=True)
        assert array.flags.c_contiguous


def assert_golden_features(name, file, images):
    """Checks the pooled features of a run that loads the file, from the pixels on."""
    golden = np.load(weights.GOLDEN / "backbones.npz")
    features = [golden[f"{name}_{pooling}"] for pooling in ("gap", "gmp")]
    config = tiny.config(
        images,
        model__backbone=name,
        model__pretrained=str(file),
        model__freeze_bn=True,
        model__dim=features[0].shape[1],
        data__image_size=32,
        data__resize=32,
        **BACKBONE_DEFAULTS,
    )
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    variables = network_variables(built.init())
    # With an identity head the embedding equals the pooled features.
    head = {"kernel": jnp.eye(config.model.dim), "bias": jnp.zeros(config.model.dim)}
    variables["params"]["head"] = head
    embedders = [built.network.embedder.clone(pooling=pooling) for pooling in ("gap", "gmp")]
    ours = jax.jit(lambda v, x: [one.apply(v, x, train=False) for one in embedders])(
        variables, jnp.asarray(pixels(name))
    )
    for pooled, reference in zip(ours, features, strict=True):
        assert np.linalg.norm(pooled - reference) < 1e-4 * np.linalg.norm(reference)


def test_classifier_and_counters_are_ignored(state_dict):
    state_dict["bn1.num_batches_tracked"] = np.int64(7)
    variables = pretrained.convert("resnet18", state_dict)
    names = {"/".join(str(key.key) for key in path) for path, _ in _leaves(variables)}
    assert "params/layer1.0/conv1/kernel" in names
    assert "batch_stats/layer2.0/downsample.1/var" in names
    assert not any("fc" in name or "num_batches" in name for name in names)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_the_error_lists_every_tensor_that_does_not_fit(state_dict):
    del state_dict["bn1.weight"], state_dict["layer1.0.conv1.weight"]
    state_dict["layer9.weight"] = np.zeros(3, np.float32)
    state_dict["conv1.weight"] = np.zeros((64, 3, 3, 5), np.float32)
    state_dict["bn1.bias"] = np.zeros(32, np.float32)
    with pytest.raises(ValueError, match="the weights do not fit resnet18") as error:
        pretrained.convert("resnet18", state_dict)
    assert re.split("; |: ", str(error.value))[1:] == [
        "bn1.bias is [32], but should be [64]",
        "bn1.weight is missing",
        "conv1.weight is [64, 3, 3, 5], but should be [64, 3, 7, 7]",
        "layer1.0.conv1.weight is missing",
        "layer9.weight is unexpected",
    ]


def test_weights_of_another_backbone_raise(state_dict):
    with pytest.raises(ValueError, match="layer1.0.conv3.weight is missing"):
        pretrained.convert("resnet50", state_dict)


@pytest.mark.parametrize("name", ["weights.pth", "epoch-1234567.pth", "net-nothexadecimal.pth"])
def test_a_file_without_a_hash_in_its_name_is_not_checked(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    pretrained.check_hash(tmp_path / name)


# sha256 of "anything".
ANYTHING = "ee0874170b7f6f32b8c2ac9573c428d35b575270a66b757c2c0185d2bd09718d"


@pytest.mark.parametrize("digits", [8, 9, 64])
def test_a_file_is_checked_against_the_hash_in_its_name(digits, tmp_path):
    good = tmp_path / f"bn_inception-{ANYTHING[:digits]}.pth"
    good.write_bytes(b"anything")
    pretrained.check_hash(good)
    good.write_bytes(b"anything else")
    with pytest.raises(ValueError, match=f"SHA-256 begins with .*, not with {ANYTHING[:digits]};"):
        pretrained.check_hash(good)


@pytest.mark.parametrize("classifier", ["fc", "last_linear"])
def test_classifiers_of_bninceptions_ports_are_ignored(classifier):
    shapes = weights.SHAPES["bninception"]
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    arrays[f"{classifier}.weight"] = np.zeros((1000, 1024), np.float32)
    arrays[f"{classifier}.bias"] = np.zeros(1000, np.float32)
    assert "conv1_7x7_s2" in pretrained.convert("bninception", arrays)["params"]


def test_converted_weights_are_copies(state_dict):
    variables = pretrained.convert("resnet18", state_dict)
    state_dict["bn1.weight"][:] = 5
    assert (variables["params"]["bn1"]["scale"] == 0).all()


def test_half_precision_is_read_as_float32(state_dict, tmp_path):
    state_dict["bn1.weight"] = np.linspace(0, 1, 64).astype(ml_dtypes.bfloat16)
    state_dict["bn1.bias"] = np.linspace(0, 1, 64).astype(np.float16)
    save_file(state_dict, tmp_path / "half.safetensors")
    variables = pretrained.load("resnet18", str(tmp_path / "half.safetensors"))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        variables["params"]["bn1"]["scale"], state_dict["bn1.weight"].astype(np.float32)
    )
    np.testing.assert_array_equal(
        variables["params"]["bn1"]["bias"], state_dict["bn1.bias"].astype(np.float32)
    )


def test_integer_weights_raise(state_dict):
    state_dict["conv1.weight"] = state_dict["conv1.weight"].astype(np.int8)
    with pytest.raises(ValueError, match="conv1.weight is int8, but should be floating-point"):
        pretrained.convert("resnet18", state_dict)


def test_the_error_of_an_invalid_file_contains_its_path(state_dict, tmp_path):
    file = tmp_path / "mine.safetensors"
    with pytest.raises(FileNotFoundError, match=f"no weights at {file}"):
        pretrained.load("resnet18", str(file))
    del state_dict["bn1.bias"]
    save_file(state_dict, file)
    with pytest.raises(ValueError, match=f"{file}: .*resnet18: bn1.bias is missing$"):
        pretrained.load("resnet18", str(file))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is damaged or not a safetensors"):
        pretrained.load("resnet18", str(file))


def test_a_file_of_the_hub_is_read_from_its_cache(state_dict, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = Path(constants.HF_HUB_CACHE)
    repository = hub / "models--somebody--resnet18.mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(state_dict, repository / "snapshots" / commit / "model.safetensors")
    local = tmp_path / "copy.safetensors"
    shutil.copy(repository / "snapshots" / commit / "model.safetensors", local)
    expected = pretrained.load("resnet18", str(local))
    for location in ("hf:somebody/resnet18.mine", f"hf:somebody/resnet18.mine@{commit}"):
        chex.assert_trees_all_equal(pretrained.load("resnet18", location), expected)
    for location in ("hf:somebody/resnet18.mine@v2", "hf:somebody/else"):
        with pytest.raises(FileNotFoundError, match=f"{location} .*hf download.*HF_HUB_OFFLINE"):
            pretrained.load("resnet18", location)

    # timm's config.json states the normalisation of the input; without one it is not known.
    location = "hf:somebody/resnet18.mine"
    pretrained.load("resnet18", location, INCEPTION)
    published = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    config = repository / "snapshots" / commit / "config.json"
    config.write_text(json.dumps(published))
    chex.assert_trees_all_equal(pretrained.load("resnet18", location, INCEPTION), expected)
    with pytest.raises(ValueError, match="set config.model.normalisation=inception"):
        pretrained.load("resnet18", location, IMAGENET)
    del state_dict["bn1.bias"]
    save_file(state_dict, config.with_name("model.safetensors"))
    config.write_text(json.dumps(published | {"architecture": "resnet26"}))
    with pytest.raises(ValueError, match="bn1.bias is missing .*is said to hold resnet26"):
        pretrained.load("resnet18", location, INCEPTION)
    for unknown in ("{", "[]", '{"pretrained_cfg": {"mean": "a"}}', '{"pretrained_cfg": [1]}'):
        config.write_text(unknown)
        with pytest.raises(ValueError, match="bn1.bias is missing$"):
            pretrained.load("resnet18", location, IMAGENET)
    config.write_text(json.dumps(published).replace("0.5", "0.1"))
    with pytest.raises(ValueError, match="was trained with images of mean .* choose other weights"):
        pretrained.load("resnet18", location, IMAGENET)


def test_other_images_than_those_of_the_hubs_config_are_stated(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda *_, **__: str(config))
    location = "hf:timm/vit_small_patch14_dinov2.lvd142m"

    def difference(size, resize, **published):
        whole = {"mean": [0.5] * 3, "std": [0.5] * 3} | published
        config.write_text(json.dumps({"pretrained_cfg": whole}))
        return pretrained.other_images(location, size, resize)

    of_timm = {"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center"}
    assert difference(224, 256, **of_timm) is None
    assert "made for images of 224 pixels, resized to 256 with bicubic interpolation" in difference(
        224, 257, **of_timm
    )
    dinov2 = difference(224, 256, input_size=[3, 518, 518], crop_pct=1.0)
    assert dinov2 == (
        f"{location} was made for images of 518 pixels, resized to 518 with bicubic interpolation "
        "(crop mode center); this run has config.data.image_size=224 and config.data.resize=256 "
        "with a centre crop"
    )
    assert "crop mode squash" in difference(224, 256, **of_timm | {"crop_mode": "squash"})
    for unknown in ({}, {"input_size": 3}, {"input_size": []}, of_timm | {"crop_pct": 0}):
        assert difference(224, 256, **unknown) is None
    assert pretrained.other_images("none", 224, 256) is None


@pytest.mark.parametrize("location", ["none", "a/b.safetensors", "hf:timm/resnet50.tv_in1k@main"])
def test_valid_locations(location):
    assert pretrained.is_location(location)


@pytest.mark.parametrize(
    "location", ["", "None", "a.pth", "hf:resnet", "hf:a/b/c", "timm/resnet18"]
)
def test_invalid_locations(location):
    assert not pretrained.is_location(location)


def test_nonfinite_weights_raise(state_dict):
    state_dict["bn1.running_var"] = np.full(64, np.nan, np.float32)
    state_dict["bn1.bias"] = np.full(64, np.inf, np.float32)
    with pytest.raises(ValueError, match="bn1.bias is not finite; bn1.running_var is not finite$"):
        pretrained.convert("resnet18", state_dict)


def raw_file(header, data=bytes(8), length=None):
    """Returns a safetensors file with any header and any stated length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CORRUPT_FILES = {
    "a header longer than the file": raw_file({}, length=1 << 62),
    "a header of any length": raw_file({}, length=(1 << 64) - 1),
    "no header": b"\x00" * 7,
    "a header that is not JSON": raw_file(b"{" * 1000),
    "a deep header": raw_file(b"[" * 100_000),
    "overlapping tensors": raw_file({"a": tensor(), "b": tensor()}),
    "offsets beyond the end": raw_file({"a": tensor(offsets=(0, 1 << 40), shape=(1 << 38,))}),
    "decreasing offsets": raw_file({"a": tensor(offsets=(8, 0))}),
    "a gap": raw_file({"a": tensor(shape=(1,), offsets=(4, 8))}),
    "a wrong shape": raw_file({"a": tensor(shape=(3,))}),
    "a shape that overflows": raw_file({"a": tensor(shape=(1 << 62, 1 << 62))}),
    "an unknown type": raw_file({"a": tensor("PICKLE")}),
    "a type that numpy lacks": raw_file({"a": tensor("F8_E8M0", shape=(8,))}),
    "another type": raw_file({"a": tensor("I64", shape=(1,))}),
    "trailing bytes": raw_file({"a": tensor()}, data=bytes(16)),
}


@pytest.mark.parametrize("kind", CORRUPT_FILES)
def test_the_error_of_a_corrupt_header_contains_the_path(kind, tmp_path):
    file = tmp_path / "corrupt.safetensors"
    file.write_bytes(CORRUPT_FILES[kind])
    with pytest.raises(ValueError, match=f"^{file}( is damaged|: the weights do not fit)") as error:
        pretrained.load("resnet18", str(file))
    assert len(str(error.value)) < 4000


def test_arbitrary_files_raise_only_documented_errors(tmp_path):
    file = tmp_path / "fuzzed.safetensors"
    shapes = {"conv1.weight": (2, 3), "bn1.bias": (4,)}
    save_file({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, file)

    @settings(max_examples=60)
    @given(damaged(file.read_bytes()))
    def try_all(content):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)):
            pretrained.load("resnet18", str(file))

    try_all()


@pytest.mark.parametrize("location", ["hf:a/b@../../x", "hf:a/b@/etc", "hf:a/b@x/../y"])
def test_a_revision_cannot_leave_the_cache(location):
    assert not pretrained.is_location(location)
