import math
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import dml_jax
from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.evaluation import embedding_files, zero_shot
from dml_jax.evaluation import network as networks
from dml_jax.inference import export, trained
from dml_jax.models import adapters, create_backbone, registry, vit
from dml_jax.models.embedder import Embedder, parts_above
from dml_jax.training import builder, cost, fork, resume, run, run_directory
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse
from dml_jax.training.optimizer import _has_decay
from dml_jax.training.state import network_variables, split
from tests.helpers import tiny

FEATURES, HEADS, DEPTH = 16, 2, 2
ViT = partial(vit.ViT, patch=4, features=FEATURES, depth=DEPTH, heads=HEADS, grid=4)
registry.register_backbone("vit1")(partial(ViT, depth=1))
registry.register_backbone("vit2_wide")(partial(ViT, features=64))
VIT1 = {"model__backbone": "vit1", "model__width": None}
WIDE = {"model__backbone": "vit2_wide", "model__width": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def initial(backbone, pixels):
    params = jax.jit(partial(backbone.init, train=False))(jax.random.key(0), pixels)["params"]
    return flax.traverse_util.flatten_dict(params)


def shapes(backbone, pixels):
    return jax.eval_shape(partial(initial, backbone), pixels)


def apply(backbone, flat, pixels):
    variables = {"params": flax.traverse_util.unflatten_dict(flat)}
    return jax.jit(partial(backbone.apply, train=False))(variables, pixels)


def random(flat, seed=0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for path, x in flat.items()}


def test_low_rank_updates_are_zero_at_first_and_then_those_of_merged_weights(pixels):
    plain, adapted = ViT(), ViT(lora_rank=3)
    flat, own = initial(adapted, pixels), initial(plain, pixels)
    assert own.keys() == {path for path in flat if not adapters.is_adapter(path)}
    assert all((flat[path] == own[path]).all() for path in own)
    np.testing.assert_array_equal(apply(adapted, flat, pixels), apply(plain, own, pixels))
    down = flat["blocks.1", "attn", "qkv", "lora_down", "kernel"]
    assert 0.7 * FEATURES**-0.5 < np.abs(down).max() <= FEATURES**-0.5

    flat = random(flat)
    pooled = shapes(adapted.clone(attention_pool=True), pixels)
    layers = {path[:-2] for path in pooled if "lora_up" in path}
    assert layers == {(f"blocks.{i}", "attn", x) for i in range(DEPTH) for x in ("qkv", "proj")}
    own = {path: flat[path] for path in own}
    merged = dict(own)
    for layer in layers:
        down, up = (flat[*layer, name, "kernel"] for name in ("lora_down", "lora_up"))
        assert down.shape == (FEATURES, 3)
        merged[*layer, "kernel"] += down @ up
    expected = apply(plain, merged, pixels)
    assert np.abs(expected - apply(plain, own, pixels)).max() > 0.1
    np.testing.assert_allclose(apply(adapted, flat, pixels), expected, rtol=1e-5, atol=1e-5)


def layer_norm(x, weights, name):
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x - x.mean(-1, keepdims=True)) / deviation * weights[*name, "scale"] + weights[
        *name, "bias"
    ]


def prompted_transformer(flat, embedded):
    """VPT-Deep of the paper in float64: [class token, prompts, other tokens]."""
    weights = {path: np.asarray(x, np.float64) for path, x in flat.items()}

    def dense(x, *name):
        return x @ weights[*name, "kernel"] + weights[*name, "bias"]

    erf = np.vectorize(math.erf)
    result = []
    for x in np.asarray(embedded[:, 0], np.float64):
        for block in (f"blocks.{i}" for i in range(DEPTH)):
            prompts = weights[block, "prompt", "prompts"][0]
            z = np.concatenate([x[:1], prompts, x[1:]])
            q, k, v = np.split(
                dense(layer_norm(z, weights, (block, "norm1")), block, "attn", "qkv"), 3, 1
            )
            heads = []
            for own in np.split(np.arange(FEATURES), HEADS):
                scores = np.exp(q[:, own] @ k[:, own].T / math.sqrt(len(own)))
                heads.append(scores / scores.sum(1, keepdims=True) @ v[:, own])
            z = z + dense(np.concatenate(heads, 1), block, "attn", "proj")
            hidden = dense(layer_norm(z, weights, (block, "norm2")), block, "mlp", "fc1")
            z = z + dense(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, block, "mlp", "fc2")
            x = np.concatenate([z[:1], z[1 + len(prompts) :]])
        result.append(layer_norm(x, weights, ("norm",)))
    return np.stack(result)


def test_prompts_are_those_of_the_formula(pixels):
    plain, backbone = ViT(registers=1), ViT(registers=1, prompts=3)
    flat = initial(backbone, pixels)
    own = initial(plain, pixels)
    assert all((flat[path] == own[path]).all() for path in own)
    bound = (6 / (3 * 16 + FEATURES)) ** 0.5
    drawn = np.stack([flat[f"blocks.{i}", "prompt", "prompts"] for i in range(DEPTH)])
    assert 0.9 * bound < np.abs(drawn).max() <= bound
    assert abs(drawn.mean()) < 5 * bound / (3 * drawn.size) ** 0.5

    flat = random(flat)
    variables = {"params": flax.traverse_util.unflatten_dict(flat)}
    embedded = backbone.apply(variables, pixels, train=False, parts=("patch_embed",))
    tokens = apply(backbone, flat, pixels)
    assert tokens.shape == (2, 1, 1 + 1 + 16, FEATURES)
    expected = prompted_transformer(flat, embedded)
    np.testing.assert_allclose(tokens[:, 0], expected, rtol=1e-4, atol=1e-5)
    without = apply(plain, {path: flat[path] for path in own}, pixels)
    assert np.abs(tokens - without).max() > 0.01


def test_in_bfloat16_gradients_are_float32(pixels):
    backbone = ViT(lora_rank=2, prompts=3, dtype="bfloat16")
    flat = random(shapes(backbone, pixels))
    tokens = apply(backbone, flat, pixels)
    assert tokens.dtype == jnp.bfloat16
    expected = apply(backbone.clone(dtype="float32"), flat, pixels)
    error = np.linalg.norm(tokens.astype(np.float32) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
    gradients = jax.eval_shape(
        jax.grad(lambda flat: apply(backbone, flat, pixels).astype(jnp.float32).sum()), flat
    )
    assert {x.dtype for x in gradients.values()} == {jnp.dtype("float32")}


def test_adapters_belong_to_their_block_and_prompts_have_no_decay_of_tokens(pixels):
    backbone = ViT(lora_rank=2, prompts=3)
    above = parts_above(Embedder(backbone=backbone, pooling="gap", dim=2), 16)
    assert above["backbone", "blocks.1", "prompt", "prompts"] == 1
    assert above["backbone", "blocks.0", "attn", "qkv", "lora_up", "kernel"] == 2
    has_decay = flax.traverse_util.flatten_dict(
        _has_decay(flax.traverse_util.unflatten_dict(shapes(backbone, pixels)))
    )
    assert not has_decay["blocks.1", "prompt", "prompts"]
    assert has_decay["blocks.0", "attn", "qkv", "lora_up", "kernel"]


def test_the_number_of_trained_parameters_is_that_of_the_formula(images):
    settings = {"model__backbone": "vit_small_patch16", "model__width": None}
    config = parse(tiny.config(images, model__lora_rank=4, model__prompts=5, **settings))
    network = networks.make(config.model, config.data, sharding.make_mesh(), batch_size=8)
    changing, _ = split({"embedder": network.variables_shape["params"]}, network.fixed)
    width, blocks = 384, 12
    sizes = {
        "prompts": 5 * width * blocks,
        "qkv": 4 * (width + 3 * width) * blocks,
        "proj": 4 * (width + width) * blocks,
        "head": (width + 1) * config.model.dim,
    }
    found = dict.fromkeys(sizes, 0)
    for path, x in flax.traverse_util.flatten_dict(changing["embedder"]).items():
        (name,) = set(path) & sizes.keys()
        found[name] += x.size
    assert found == sizes
    assert found["qkv"] + found["proj"] == 110_592


@pytest.mark.slow
def test_a_step_changes_only_adapters_head_and_proxies_on_any_number_of_devices(images):
    settings = {"optimizer__weight_decay": 0.1, "micro_batches": 2, "model__remat": True}
    config = tiny.config(images, model__lora_rank=2, model__prompts=3, **settings, **VIT1)
    losses = []
    for devices in (1, 2):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        built = builder.build(parse(config), mesh, data.InspectionReport({}, {}))
        state = built.init()
        before = flax.traverse_util.flatten_dict(jax.device_get(state.params))
        # More than one step, since A has no gradient while B is zero.
        for _, batch in device_batches(built, 0, 4):
            state, metrics = built.take_step(state, batch)
            losses.append(float(metrics.loss))
        after = flax.traverse_util.flatten_dict(jax.device_get(state.params))
        changed = {path for path in before if (before[path] != after[path]).any()}
        expected = {path for path in before if adapters.is_adapter(path)}
        assert len(expected) == 2 * 2 + 1
        expected |= {path for path in before if path[0] == "proxies" or path[1] == "head"}
        assert changed == expected
        for moment in ("mu", "nu"):
            kept = flax.traverse_util.flatten_dict(optax.tree.get(state.opt_state, moment))
            assert kept.keys() == expected
    assert len(set(losses[:4])) == 4
    np.testing.assert_allclose(losses[4:], losses[:4], rtol=1e-5)


def test_fixed_weights_have_no_gradient(images):
    """A backward pass is then one more pass, and micro-batches repeat the forward pass."""
    for parts in (1, 2):
        config = tiny.config(images, model__lora_rank=1, micro_batches=parts, **WIDE)
        built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
        pixels = jax.ShapeDtypeStruct((8, tiny.SIZE, tiny.SIZE, 3), np.uint8)
        step = built.take_step.lower(built.abstract_state, builder.abstract_batch(built))
        embed = built.network.embed.lower(built.network.variables_shape, pixels)
        passes = step.cost_analysis()["flops"] / embed.cost_analysis()["flops"]
        assert parts + 0.7 < passes < parts + 1.3
        counted = cost.operations(built.config)
        assert 1.7 < counted.training / counted.evaluation < 2.3


def test_what_has_no_adapters_is_refused(images):
    refused = {
        "lora_rank is 2, but conv4 has no lora_rank": {
            "model__backbone": "conv4",
            "model__lora_rank": 2,
        },
        "prompts is 2, but resnet6 has no prompts": {
            **tiny.RESNET,
            "model__width": None,
            "model__prompts": 2,
        },
        "prompts is 2, .* but config.model.train_from is 'head'": {
            **VIT1,
            "model__prompts": 2,
            "model__train_from": "head",
        },
    }
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            parse(tiny.config(images, **settings))


def test_a_fork_from_a_run_without_these_adapters_is_refused(images, tmp_path):
    resume.claim(tmp_path / "old", parse(tiny.config(images, **VIT1)))
    config = parse(tiny.config(images, model__lora_rank=2, **VIT1))
    network = networks.make(config.model, config.data, sharding.make_mesh(), batch_size=8)
    with pytest.raises(ValueError, match="config.model.lora_rank is 2, but the run .* has 0"):
        fork.read_fork(network, tmp_path / "old")


def pretrained_file(path):
    """Writes random weights with timm's names, and returns the parameters by path."""
    backbone = create_backbone("vit1")
    flat = random(shapes(backbone, jnp.zeros((1, 16, 16, 3))), seed=1)
    leaves, axes = {"kernel": "weight", "scale": "weight"}, {4: (3, 2, 0, 1), 2: (1, 0)}
    tensors = {
        ".".join((*name, leaves.get(leaf, leaf))): np.ascontiguousarray(
            np.transpose(x, axes.get(x.ndim, range(x.ndim)))
        )
        for (*name, leaf), x in flat.items()
    }
    save_file(tensors, path)
    return flat


@pytest.mark.slow
def test_a_run_from_pretrained_weights_is_resumed_and_exported(images, tmp_path):
    flat = pretrained_file(tmp_path / "vit1.safetensors")
    settings = {**VIT1, "model__pretrained": str(tmp_path / "vit1.safetensors")}
    adapted = {
        "model__lora_rank": 2,
        "model__prompts": 3,
        "model__pooling": "token",
        "optimizer__layer_decay": 0.75,
    }
    folder = tmp_path / "run"
    run.train(tiny.config(images, epochs=1, **settings, **adapted), folder)
    result = run.train(tiny.config(images, epochs=2, **settings, **adapted), folder)
    assert result["last"]["epoch"] == 2

    # The features without training are those without prompts.
    plain = tiny.config(images, model__train_from="head", model__pooling="token", **settings)
    built = builder.build(parse(plain), sharding.make_mesh())
    features = zero_shot.pooled_features(built.evaluator, network_variables(built.init()), "test")
    assert result["zero_shot"] == built.evaluator.score(features)

    _, variables, _ = trained.load(folder, "last", sharding.make_mesh(jax.devices()[:1]))
    after = flax.traverse_util.flatten_dict(variables["params"]["backbone"])
    unchanged = {path for path in flat if (flat[path] == after[path]).all()}
    assert unchanged == flat.keys()
    assert all(np.any(after[path]) for path in after.keys() - flat.keys())

    export.write(folder, tmp_path / "export", "last")
    saved = embedding_files.load_embeddings(folder / run_directory.EMBEDDINGS)
    paths = [images / name for name in saved.names]
    found = [dml_jax.load(place).embed(paths) for place in (folder, tmp_path / "export")]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    unit = found[1] / np.linalg.norm(found[1], axis=1, keepdims=True)
    expected = saved.embeddings / np.linalg.norm(saved.embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-5)
