from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dml_jax._utils import sharding
from dml_jax.models import bninception, create_backbone, layers, resnet

NETWORKS = {
    "resnet": partial(resnet.ResNet, stage_sizes=(4,), bottleneck=False, width=8, stem="small"),
    "bninception": bninception.BNInception,
}


@pytest.mark.parametrize("name", ["resnet", pytest.param("bninception", marks=pytest.mark.slow)])
def test_rematerialisation_changes_only_the_memory_use(name, monkeypatch):
    # All blocks would take long to compile.
    monkeypatch.setattr(bninception, "BLOCKS", {"3a": bninception.BLOCKS["3a"]})
    stored, remat = (NETWORKS[name](remat=option) for option in (False, True))
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    variables, remat_variables = jax.jit(
        lambda: tuple(x.init(jax.random.key(1), images[:1], train=False) for x in (stored, remat))
    )()
    chex.assert_trees_all_equal(remat_variables, variables)

    def gradients(backbone):
        def loss(params):
            inputs = variables | {"params": params}
            features, updates = backbone.apply(inputs, images, train=True, mutable=["batch_stats"])
            return (features**2).mean(), updates

        return jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"]).compile()

    compiled = gradients(stored), gradients(remat)
    expected, computed = (function(variables["params"]) for function in compiled)
    chex.assert_trees_all_equal_structs(computed, expected)
    for x, y in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        # The gradient of a bias before batch normalisation is 0 up to rounding.
        assert jnp.linalg.norm(x - y) <= 1e-6 * (1 + jnp.linalg.norm(y))
    memory = [function.memory_analysis().temp_size_in_bytes for function in compiled]
    # The CPU compiler of JAX 0.10 removes rematerialisation as a common subexpression.
    assert (memory[1] < 0.9 * memory[0]) == (jax.__version_info__ >= (0, 12)), memory


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet18", 1 + 8), ("bninception", 1 + 10), ("convnext_tiny", 18)]
)
def test_every_block_is_rematerialised(name, blocks):
    backbone = create_backbone(name, remat=True)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    traced = jax.make_jaxpr(lambda v, x: backbone.apply(v, x, train=False))(variables, images)
    primitives = [str(equation.primitive) for equation in traced.eqns]
    # The name of the primitive depends on the version of JAX.
    assert sum(name in ("remat2", "checkpoint") for name in primitives) == blocks, set(primitives)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_equals_flaxs_on_any_number_of_devices(dtype):
    ours = layers.BatchNorm(use_running_average=False, dtype=dtype)
    theirs = nn.BatchNorm(
        use_running_average=False, momentum=0.9, use_fast_variance=False, dtype=dtype
    )
    # Means far from zero, and another one on each device.
    x = 100 + 5 * jnp.arange(8.0)[:, None, None, None]
    x = (x + jax.random.normal(jax.random.key(0), (8, 3, 3, 4))).astype(dtype)
    weights = jax.random.normal(jax.random.key(1), x.shape)
    variables = theirs.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(ours.init(jax.random.key(0), x), variables)

    def results(module, mesh):
        def objective(params, x):
            y, updates = module.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return jnp.sum(weights * y.astype(jnp.float32)), (y, updates)

        with jax.set_mesh(mesh):
            rows = jax.device_put(x, sharding.batch_sharding(mesh))
            return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
                variables["params"], rows
            )

    expected = results(theirs, sharding.make_mesh(jax.devices()[:1]))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for devices in (1, 2, 8):
        found = results(ours, sharding.make_mesh(jax.devices()[:devices]))
        chex.assert_trees_all_close(
            *jax.device_get((found, expected)), rtol=tolerance, atol=tolerance
        )
