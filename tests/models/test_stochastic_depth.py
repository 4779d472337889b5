from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dml_jax.models import convnext, layers, resnet, vit

BLOCKS, RATE = 5, 0.6


class Branches(nn.Module):
    """Returns what is left of branches of ones, two for each block."""

    drop_path: float = RATE

    @nn.compact
    def __call__(self, rows, *, train):
        drops = layers.stochastic_depth(self, BLOCKS, train=train)
        ones = jnp.ones((rows, 2, 3))
        return jnp.stack([jnp.stack([drop(ones, branch) for branch in (0, 1)]) for drop in drops])


def test_branches_of_single_images_are_dropped_at_rates_that_grow_with_depth():
    rows = 20_000
    left = Branches().apply({}, rows, train=True, rngs={"dropout": jax.random.key(0)})
    # An image's whole branch is dropped or kept.
    assert (left == left[..., :1, :1]).all()
    left = np.asarray(left[..., 0, 0])
    for block, of_block in enumerate(left):
        keep = 1 - RATE * block / (BLOCKS - 1)
        kept = of_block > 0
        np.testing.assert_allclose(of_block[kept], 1 / keep, rtol=1e-6)
        # Five standard deviations, for the rates and the mean, which stays 1.
        error = 5 * (keep * (1 - keep) / rows) ** 0.5
        np.testing.assert_allclose(kept.mean(axis=1), keep, atol=error)
        np.testing.assert_allclose(of_block.mean(axis=1), 1, atol=error / keep)
    # Blocks and branches are independent of each other.
    correlation = np.corrcoef(left[1:].reshape(-1, rows)) - np.eye(2 * (BLOCKS - 1))
    assert np.abs(correlation).max() < 5 / rows**0.5


VIT = partial(vit.ViT, patch=8, features=16, depth=2, heads=2, grid=2, layer_scale=True)
# Networks of two blocks, and the parameters that scale the branches of the second one.
NETWORKS = {
    "vit": (VIT, ("blocks.1/ls1", "blocks.1/ls2")),
    "convnext": (partial(convnext.ConvNeXt, (2,), width=8), ("stages.0.blocks.1/gamma",)),
    "resnet": (
        partial(resnet.ResNet, (2,), False, width=8, stem="small", freeze_bn=True),
        ("layer1.1/bn2",),
    ),
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)


def network_and_variables(name, **options):
    """Returns a network and its variables, with those of the second block's scales and without."""
    made, scales = NETWORKS[name]
    network = made(**options)
    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)
    flat = {
        path: rng.uniform(0.1, 0.4, x.shape).astype(np.float32) * rng.choice([1, -1], x.shape)
        for path, x in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    flat = {path: abs(x) if path.endswith("var") else x for path, x in flat.items()}
    without = {path: 0 * x if any(y in path for y in scales) else x for path, x in flat.items()}
    return network, *(traverse_util.unflatten_dict(x, sep="/") for x in (flat, without))


@pytest.mark.parametrize("name", NETWORKS)
def test_at_a_rate_near_1_the_last_block_adds_nothing_in_training_alone(name):
    dropping, variables, without = network_and_variables(name, drop_path=1 - 1e-6)
    never = dropping.clone(drop_path=0.0)

    def features(network, train):
        rngs = {"dropout": jax.random.key(2)} if train else {}
        return lambda variables: network.apply(variables, IMAGES, train=train, rngs=rngs)

    evaluated = jax.jit(features(never, False))
    whole, rest = evaluated(variables), evaluated(without)
    assert np.abs(whole - rest).max() > 1e-2
    np.testing.assert_allclose(jax.jit(features(dropping, True))(variables), rest, rtol=1e-4)
    # Without a rate, or without training, it is the same program.
    programs = {
        str(jax.make_jaxpr(features(*case))(variables))
        for case in ((never, False), (never, True), (dropping, False))
    }
    assert len(programs) == 1


def test_rematerialisation_drops_the_same_branches():
    network, variables, _ = network_and_variables("vit", drop_path=0.5)

    @partial(jax.jit, static_argnames="network")
    def gradients(network, params):
        def loss(params):
            rngs = {"dropout": jax.random.key(2)}
            features = network.apply({"params": params}, IMAGES, train=True, rngs=rngs)
            return jnp.sum(jnp.cos(jnp.arange(16.0)).reshape(1, 1, 1, 16) * features)

        return jax.grad(loss)(params)

    params = variables["params"]
    stored, remat = (gradients(x, params) for x in (network, network.clone(remat=True)))
    for x, y in zip(jax.tree.leaves(remat), jax.tree.leaves(stored), strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)
