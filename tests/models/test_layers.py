from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from dml_jax.models import bninception, create_backbone, resnet

NETWORKS = {
    "resnet": partial(resnet.ResNet, stage_sizes=(4,), bottleneck=False, width=8, stem="small"),
    "bninception": bninception.BNInception,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_computed_again_change_nothing_but_memory(name, monkeypatch):
    # All of them would take long to compile.
    monkeypatch.setattr(bninception, "BLOCKS", {"3a": bninception.BLOCKS["3a"]})
    kept, again = (NETWORKS[name](remat=remat) for remat in (False, True))
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    variables, of_again = jax.jit(
        lambda: tuple(x.init(jax.random.key(1), images[:1], train=False) for x in (kept, again))
    )()
    chex.assert_trees_all_equal(of_again, variables)

    def gradients(backbone):
        def loss(params):
            inputs = variables | {"params": params}
            features, updates = backbone.apply(inputs, images, train=True, mutable=["batch_stats"])
            return (features**2).mean(), updates

        return jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"]).compile()

    compiled = gradients(kept), gradients(again)
    expected, computed = (function(variables["params"]) for function in compiled)
    chex.assert_trees_all_equal_structs(computed, expected)
    for x, y in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        # Where batch normalisation follows, a bias has a gradient of 0, give or take rounding.
        assert jnp.linalg.norm(x - y) <= 1e-6 * (1 + jnp.linalg.norm(y))
    memory = [function.memory_analysis().temp_size_in_bytes for function in compiled]
    # JAX 0.10's CPU compiler does not keep what is computed again apart from the first time.
    assert (memory[1] < 0.9 * memory[0]) == (jax.__version_info__ >= (0, 12)), memory


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 1 + 8), ("bninception", 1 + 10)])
def test_every_block_is_computed_again(name, blocks):
    backbone = create_backbone(name, remat=True)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    traced = jax.make_jaxpr(lambda v, x: backbone.apply(v, x, train=False))(variables, images)
    primitives = [str(equation.primitive) for equation in traced.eqns]
    # What JAX calls it depends on its version.
    assert sum(name in ("remat2", "checkpoint") for name in primitives) == blocks, set(primitives)
