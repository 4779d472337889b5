from functools import partial

import flax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import dml_jax
from dml_jax._utils import sharding
from dml_jax.inference import trained
from dml_jax.models import create_backbone, create_embedder, pretrained, vit
from dml_jax.models.embedder import Embedder
from dml_jax.training import run
from tests.helpers import tiny, weights

GOLDEN = np.load(weights.GOLDEN / "vit.npz")
SIZES = np.load(weights.GOLDEN / "timm.npz")
CASES = sorted({tuple(key.split()[:3]) for key in GOLDEN.files})


def torch_names(name):
    """Returns the path of each parameter of a backbone by timm's name."""
    init = jax.eval_shape(
        lambda: create_backbone(name).init(
            jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False
        )
    )
    leaves = {"kernel": "weight", "scale": "weight"}
    flat = flax.traverse_util.flatten_dict(init["params"])
    return {".".join((*path[:-1], leaves.get(path[-1], path[-1]))): path for path in flat}, flat


def tensors(name):
    """Returns the tensors of a backbone by timm's name, made by the rule, in PyTorch's layout."""
    names, shapes = torch_names(name)
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    made = {}
    for key, path in names.items():
        shape = shapes[path].shape
        shape = tuple(shape[i] for i in axes.get(len(shape), range(len(shape))))
        made[key] = weights.vit_tensor(key, shape)
    return made | {"head.weight": np.ones((1000, 8), np.float32)}


@pytest.mark.parametrize(("name", "depth", "size"), CASES)
def test_features_and_gradients_equal_timms(name, depth, size):
    backbone = create_backbone(name, depth=int(depth))
    variables = pretrained.convert(name, tensors(name))
    assert variables["batch_stats"] == {}
    images = jnp.asarray(weights.vit_images(int(size)))

    def objective(params):
        tokens = backbone.apply({"params": params}, images, train=True)[:, 0]
        weight = jnp.cos(jnp.arange(tokens.shape[-1], dtype=jnp.float32))
        return jnp.sum(tokens[:, 0] * weight[None]), tokens

    gradients, tokens = jax.jit(jax.grad(objective, has_aux=True))(variables["params"])
    names, _ = torch_names(name)
    gradients = flax.traverse_util.flatten_dict(gradients)
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    found = {"token": tokens[:, 0], "gap": tokens[:, backbone.prefix_tokens :].mean(1)}
    for key in ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.1.attn.qkv.weight"):
        x = gradients[names[key]]
        x = np.asarray(x.transpose(axes[x.ndim]) if x.ndim in axes else x)
        found[key] = x.reshape(-1)[:: max(1, x.size // 200)]
    for key, ours in found.items():
        expected = GOLDEN[f"{name} {depth} {size} {key}"]
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (key, error)


def test_in_bfloat16_features_differ_by_its_rounding():
    name, size = "vit_tiny_patch16", 160
    variables = pretrained.convert(name, tensors(name))
    backbone = create_backbone(name, dtype="bfloat16")
    images = jnp.asarray(weights.vit_images(size))
    token = jax.jit(lambda: backbone.apply(variables, images, train=False))()[:, 0, 0]
    assert token.dtype == jnp.bfloat16
    expected = GOLDEN[f"{name} 12 {size} token"]
    error = np.linalg.norm(np.asarray(token, np.float32) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("name", vit.VARIANTS)
def test_the_number_of_parameters_is_timms(name):
    _, shapes = torch_names(name)
    parameters, _ = SIZES[f"sizes {name}"]
    assert sum(x.size for x in shapes.values()) == parameters


def test_an_unknown_tensor_and_a_missing_one_are_named():
    name = "vit_tiny_patch16"
    changed = tensors(name) | {"blocks.0.ls1.gamma": np.ones(192, np.float32)}
    del changed["cls_token"]
    changed["blocks.2.mlp.fc1.weight"] = changed["blocks.2.mlp.fc1.weight"].T
    with pytest.raises(ValueError, match="do not fit vit_tiny_patch16") as error:
        pretrained.convert(name, changed)
    assert "cls_token is missing" in str(error.value)
    assert "blocks.0.ls1.gamma is unexpected" in str(error.value)
    changed["pos_embed"] = np.ones((1, 577, 192), np.float32)
    with pytest.raises(ValueError, match="choose weights made for images of 224 pixels"):
        pretrained.convert(name, changed)
    assert "blocks.2.mlp.fc1.weight is [192, 768], but should be [768, 192]" in str(error.value)


def test_images_that_the_patches_do_not_cover_are_refused():
    backbone = create_backbone("vit_tiny_patch16")
    with pytest.raises(ValueError, match="patches of 16 pixels do not cover images of 100x100"):
        jax.eval_shape(
            lambda: backbone.init(jax.random.key(0), jnp.zeros((1, 100, 100, 3)), train=False)
        )


def test_a_function_exported_for_any_batch_size_is_the_network():
    backbone = vit.ViT(patch=4, features=8, depth=1, heads=2, grid=2, registers=2)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    shapes = jax.eval_shape(partial(backbone.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    embed = jax.jit(lambda images: backbone.apply(variables, images, train=False))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 8, 8, 3"), jnp.float32)
    exported = jax.export.export(embed)(shape)
    np.testing.assert_allclose(exported.call(images), embed(images), rtol=1e-5, atol=1e-6)


def test_pooling_leaves_the_class_token_and_registers_out():
    tokens = jnp.arange(1 * 1 * 7 * 2, dtype=jnp.float32).reshape(1, 1, 7, 2)
    backbone = vit.ViT(patch=16, features=2, depth=1, heads=1, grid=1, registers=2)
    pooled = {
        pooling: Embedder(backbone=backbone, pooling=pooling, dim=2)._pool(tokens)
        for pooling in ("token", "gap", "gmp")
    }
    np.testing.assert_array_equal(pooled["token"], tokens[:, 0, 0])
    np.testing.assert_array_equal(pooled["gap"], tokens[0, :, 3:].mean(1))
    np.testing.assert_array_equal(pooled["gmp"], tokens[0, :, 6])
    with pytest.raises(ValueError, match="'token' needs a backbone with a class token"):
        create_embedder(backbone="resnet18", pooling="token", dim=2)


def test_parts_are_the_whole_network():
    backbone = create_backbone("vit_tiny_patch16")
    images = jnp.asarray(weights.vit_images(32))
    variables = jax.jit(lambda: backbone.init(jax.random.key(0), images, train=False))()
    whole = backbone.apply(variables, images, train=False)
    x = images
    for parts in (backbone.parts[:1], backbone.parts[1:5], backbone.parts[5:]):
        x = backbone.apply(variables, x, train=False, parts=parts)
    np.testing.assert_allclose(x, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_run_trains_the_last_block_on_cached_features_and_resumes(tmp_path):
    """Also pretrained weights, the class token, micro-batches and rematerialisation."""
    images = tiny.write_images(tmp_path / "images")
    file = tmp_path / "vit.safetensors"
    save_file(
        {key: np.ascontiguousarray(x) for key, x in tensors("vit_tiny_patch16").items()}, file
    )
    settings = {
        "model__backbone": "vit_tiny_patch16",
        "model__width": None,
        "model__pretrained": str(file),
        "model__pooling": "token",
        "model__train_from": "blocks.11",
        "model__remat": True,
        "data__cache": "features",
        "data__image_size": 32,
        "data__resize": 32,
        "batch_size": 16,
        "micro_batches": 2,
        "optimizer__layer_decay": 0.75,
        "optimizer__decay_vectors": False,
        "optimizer__clip_norm": 3.0,
    }
    shorter = tiny.config(images, "ps_memvir", epochs=2, **settings)
    longer = tiny.config(images, "ps_memvir", epochs=3, **settings)
    run.train(shorter, tmp_path / "run")
    resumed = run.train(longer, tmp_path / "run")
    assert resumed["last"]["epoch"] == 3 and "zero_shot" in resumed
    model = dml_jax.load(tmp_path / "run")
    assert model.embed([images / "test" / "class0" / "0.png"]).shape == (1, 16)

    _, variables, _ = trained.load(tmp_path / "run", "last", sharding.make_mesh(jax.devices()[:1]))
    before = pretrained.load("vit_tiny_patch16", str(file))["params"]
    after = variables["params"]["backbone"]
    changed = {
        name
        for name in before
        if any(
            (x != y).any()
            for x, y in zip(
                jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
            )
        )
    }
    assert changed == {"blocks.11", "norm"}
