from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dml_jax import models
from dml_jax.models.embedder import parts_above
from dml_jax.training import optimizer, schedules, state

GOLDEN = Path(__file__).parents[1] / "golden"


def create(*, steps_per_epoch, **settings):
    return optimizer.create(optimizer.OptimizerConfig(**settings), steps_per_epoch=steps_per_epoch)


SETTINGS = {
    "name": "sgd",
    "learning_rate": 0.1,
    "proxy_learning_rate": 1.0,
    "eps": 0.01,
    "weight_decay": 0.0,
    "steps_per_epoch": 2,
    "decay_rate": 0.5,
    "decay_epochs": (2, 4),
}


@pytest.fixture(autouse=True)
def implicit_promotion():
    """Allows the implicit dtype promotion of optax's step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "optimizers.npz")


def golden_settings(golden):
    # The official programs decay at the multiples of decay_step, up to decay_stop.
    step, stop = int(golden["decay_step"]), int(golden["decay_stop"])
    decay_epochs = tuple(range(step, stop + 1, step))
    return {
        "learning_rate": float(golden["model_lr"]),
        "proxy_learning_rate": float(golden["proxy_lr"]),
        "eps": float(golden["eps"]),
        "weight_decay": float(golden["weight_decay"]),
        "steps_per_epoch": int(golden["steps_per_epoch"]),
        "decay_rate": float(golden["decay_rate"]),
        "decay_epochs": decay_epochs,
    }


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_every_step_equals_that_of_torch(golden, name):
    transformation, _ = create(name=name, **golden_settings(golden))

    def loss(params):
        w, p = params["embedder"]["w"], params["proxies"]
        return ((golden["A"] @ w) ** 2).mean() + jnp.cos(p @ w) + ((p - 1) ** 4).mean()

    @jax.jit
    def step(params, state, i):
        updates, state = transformation.update(jax.grad(loss)(params), state, params, step=i)
        return optax.apply_updates(params, updates), state

    params = {
        "embedder": {"w": jnp.asarray(golden["model_init"])},
        "proxies": jnp.asarray(golden["proxies_init"]),
    }
    state = transformation.init(params)
    for i in range(int(golden["steps"])):
        params, state = step(params, state, jnp.int32(i))
        for ours, group in ((params["embedder"]["w"], "model"), (params["proxies"], "proxies")):
            reference = golden[f"{name}_{group}"][i]
            error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
            assert error < 1e-5, f"{group} after step {i}"


def test_learning_rates_equal_the_official_ones(golden):
    _, learning_rate = create(name="adam", **golden_settings(golden))
    rates = [learning_rate(step) for step in range(int(golden["steps"]))]
    np.testing.assert_allclose(rates, golden["learning_rates"], rtol=1e-12)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ((1, 2), [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]),
        ((2,), [1, 1, 0.5, 0.5, 0.5, 0.5]),
        ((), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rates_decay_at_the_given_epochs(epochs, expected):
    settings = {**SETTINGS, "decay_epochs": epochs}
    transformation, learning_rate = create(**settings)
    assert [learning_rate(step)[1] for step in range(6)] == expected

    # The updates: the trace of earlier gradients is known, so that each update gives its rate.
    params = {"embedder": jnp.zeros(1), "proxies": jnp.zeros(1)}
    update = jax.jit(transformation.update)
    state = transformation.init(params)
    for step, rate in enumerate(expected):
        gradients = jax.tree.map(lambda x, s=step: jnp.full_like(x, 10.0**s), params)
        before = state
        updates, state = update(gradients, state, params, step=jnp.int32(step))
        trace = optax.tree.get(before, "trace")["proxies"][0]
        direction = 10.0**step + 0.9 * (10.0**step + 0.9 * float(trace))
        np.testing.assert_allclose(updates["proxies"][0], -rate * direction, rtol=1e-5)
        np.testing.assert_allclose(updates["embedder"][0], -0.1 * rate * direction, rtol=1e-5)


def test_periodic_decay_equals_the_step_schedule_of_torch():
    every = {**SETTINGS, "decay_epochs": (), "decay_every": 3}
    listed = {**SETTINGS, "decay_epochs": (4, 7, 10, 13)}
    transformation, learning_rate = create(**every)
    rates = [learning_rate(step) for step in range(26)]
    # torch.optim.lr_scheduler.StepLR(step_size=3, gamma=0.5), with two steps in an epoch.
    assert [rate for rate, _ in rates] == [0.1 * 0.5 ** (step // 2 // 3) for step in range(26)]
    assert rates == [create(**listed)[1](step) for step in range(26)]

    params = {"embedder": jnp.ones(1), "proxies": jnp.ones(1)}
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for step, expected in enumerate(rates):
        # Nesterov's first step is 1.9 times the gradient.
        updates, _ = update(params, state, params, step=jnp.int32(step))
        ours = [-float(updates[group][0]) / 1.9 for group in ("embedder", "proxies")]
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


NETWORK = {
    "backbone": {
        "conv1": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)},
        "layer1.0": {"bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)}},
    },
    "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


@pytest.mark.parametrize("frozen_epochs", [0, 2])
@pytest.mark.parametrize("name", optimizer.NAMES)
def test_fixed_parameters_do_not_change_and_have_no_optimizer_state(name, frozen_epochs):
    settings = {**SETTINGS, "name": name, "weight_decay": 0.1, "frozen_epochs": frozen_epochs}
    transformation, _ = create(**settings)
    start = {"embedder": NETWORK, "proxies": jnp.ones((3, 2))}
    bn1 = [("backbone", "layer1.0", "bn1", x) for x in ("scale", "bias")]
    trained, fixed = state.split(start, bn1)
    assert fixed.keys() == set(bn1)
    params, states = [start, trained], [transformation.init(x) for x in (start, trained)]
    update = jax.jit(transformation.update)
    for step in range(6):
        for i in range(2):
            # A function of each parameter alone, so that fixed ones do not affect the others.
            gradients = jax.tree.map(lambda x, s=step: jnp.cos(x + s), params[i])
            made, states[i] = update(gradients, states[i], params[i], step=jnp.int32(step))
            params[i] = optax.apply_updates(params[i], made)
        expected, ours = params[0], state.merge(params[1], fixed)
        expected = jax.tree.map(lambda x: x, expected)
        moved = expected["embedder"]["backbone"]["layer1.0"]["bn1"]
        is_frozen = step < 2 * frozen_epochs
        for array in moved.values():
            assert (array == 1).all() == is_frozen
        expected["embedder"]["backbone"]["layer1.0"]["bn1"] = NETWORK["backbone"]["layer1.0"]["bn1"]
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
    kept = jax.tree_util.tree_leaves_with_path(states[1])
    assert kept and not any("bn1" in jax.tree_util.keystr(path) for path, _ in kept)


def test_gradients_are_clipped_before_weight_decay_is_added():
    settings = {**SETTINGS, "clip_value": 1.0, "weight_decay": 0.5}
    transformation, _ = create(**settings)
    params = {"embedder": jnp.array([4.0, 4.0]), "proxies": jnp.array([4.0])}
    gradients = {"embedder": jnp.array([-30.0, 0.5]), "proxies": jnp.array([30.0])}
    state = transformation.init(params)
    updates, _ = transformation.update(gradients, state, params, step=jnp.int32(0))
    # Nesterov's first step is 1.9 times the gradient.
    np.testing.assert_allclose(updates["embedder"], [-0.19 * (-1 + 2), -0.19 * (0.5 + 2)], 1e-6)
    np.testing.assert_allclose(updates["proxies"], [-1.9 * (1 + 2)], 1e-6)


def test_learning_rate_needs_no_device():
    _, learning_rate = create(**SETTINGS)
    with jax.transfer_guard("disallow"):
        assert learning_rate(2) == (0.05, 0.5)


SCHEDULE = "warmup_cosine_decay_schedule"


def test_a_schedule_of_optax_multiplies_both_rates_on_host_and_device():
    arguments = {"warmup_epochs": 2, "decay_epochs": 5, "end_value": 0.1}
    settings = {**SETTINGS, "schedule": SCHEDULE, "schedule_arguments": arguments, "name": "adam"}
    transformation, learning_rate = create(**settings)
    expected = optax.warmup_cosine_decay_schedule(0.0, 1.0, 4, 10, 0.1)
    params = {"embedder": jnp.ones(1), "proxies": jnp.ones(1)}
    state, update = transformation.init(params), jax.jit(transformation.update)
    for step in range(11):
        with jax.transfer_guard("disallow"):
            rates = learning_rate(step)
        np.testing.assert_allclose(rates, np.array([0.1, 1.0]) * float(expected(step)), rtol=1e-6)
        updates, state = update(params, state, params, step=jnp.int32(step))
        ratio = float(updates["proxies"][0]) / (float(updates["embedder"][0]) or 1.0)
        assert ratio == pytest.approx(10.0 if step else 0.0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosine", {}, "unknown schedule 'cosine'; choose one of constant_schedule"),
        (SCHEDULE, {"warmup_epochs": 2}, "missing a required argument: 'decay_steps'"),
        (SCHEDULE, {"warmup_epochs": 1, "decay_epochs": 2, "power": 3}, "argument 'power'"),
    ],
)
def test_invalid_schedules_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.create(name, arguments, 10)


VIT = {
    "embedder": {
        "backbone": {
            "cls_token": jnp.ones((1, 1, 4)),
            "pos_embed": jnp.ones((1, 5, 4)),
            "blocks.0": {"fc1": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
            "norm": {"scale": jnp.ones(4)},
        },
        "head": {"kernel": jnp.ones((4, 2))},
    },
    "proxies": jnp.ones((3, 2)),
}


def changes(gradients, **settings):
    """Returns by how much each parameter of 1 decreases in one step."""
    transformation, _ = create(**SETTINGS | settings)
    updates, _ = transformation.update(
        gradients, transformation.init(VIT), VIT, step=jnp.zeros((), jnp.int32)
    )
    flat = flax.traverse_util.flatten_dict(updates)
    return {path[-1] if path[0] == "proxies" else path[-2:]: -x.min() for path, x in flat.items()}


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_vectors_and_tokens_may_have_no_weight_decay(name):
    zero = jax.tree.map(jnp.zeros_like, VIT)
    decayed = changes(zero, name=name, weight_decay=0.5, decay_vectors=False)
    without = {("backbone", "cls_token"), ("backbone", "pos_embed"), ("fc1", "bias")}
    without |= {("norm", "scale")}
    assert {path for path, change in decayed.items() if change == 0} == without
    assert all(change > 0 for change in changes(zero, name=name, weight_decay=0.5).values())


def test_the_norm_of_the_whole_gradient_is_bounded():
    ones = jax.tree.map(jnp.ones_like, VIT)
    norm = float(optax.tree.norm(ones))
    for bound, factor in ((norm / 4, 0.25), (2 * norm, 1.0)):
        plain, clipped = changes(ones), changes(ones, clip_norm=bound)
        for path, change in plain.items():
            np.testing.assert_allclose(clipped[path], factor * change, rtol=1e-6)


def test_the_learning_rate_decays_from_layer_to_layer():
    embedder = models.create_embedder(
        backbone="vit_tiny_patch16", pooling="token", dim=8, depth=3, features=12
    )
    above = parts_above(embedder, 32)
    of = {"/".join(path[1:]): count for path, count in above.items()}
    assert of["cls_token"] == of["pos_embed"] == of["patch_embed.proj/kernel"] == 4
    assert [of[f"blocks.{i}/norm1/scale"] for i in range(3)] == [3, 2, 1]
    assert of["norm/scale"] == 1 and of["kernel"] == of["bias"] == 0

    counts = {path[1:]: 0 for path in flax.traverse_util.flatten_dict(VIT) if len(path) > 1}
    counts |= {path: 2 for path in counts if "_" in path[-1]}
    counts |= {path: 1 for path in counts if path[1] in ("blocks.0", "norm")}
    ones = jax.tree.map(jnp.ones_like, VIT)
    transformation, _ = optimizer.create(
        optimizer.OptimizerConfig(
            **{name: x for name, x in SETTINGS.items() if name != "steps_per_epoch"},
            layer_decay=0.5,
        ),
        steps_per_epoch=2,
        parts_above=counts,
    )
    state_before, step = transformation.init(VIT), jnp.zeros((), jnp.int32)
    updates, _ = transformation.update(ones, state_before, VIT, step=step)
    plain, _ = create(**SETTINGS)
    expected, _ = plain.update(ones, plain.init(VIT), VIT, step=step)
    for path, x in flax.traverse_util.flatten_dict(updates["embedder"]).items():
        full = flax.traverse_util.flatten_dict(expected["embedder"])[path]
        np.testing.assert_allclose(x, full * 0.5 ** counts[path], rtol=1e-6)
    np.testing.assert_array_equal(updates["proxies"], expected["proxies"])
