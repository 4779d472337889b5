import chex
import flax
import jax
import numpy as np
import optax
import pytest

from dml_jax import data
from dml_jax._utils import sharding
from dml_jax.configs import glyphs
from dml_jax.training import builder, checkpoint, step
from dml_jax.training.batches import device_batches
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables, split
from tests.helpers import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def losses_of_run(config, devices, steps):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    # An empty report saves the time of an inspection.
    built = builder.build(parse(config), mesh, data.InspectionReport({}, {}))
    state, losses = built.init(), []
    for _, batch in device_batches(built, 0, steps):
        state, metrics = built.take_step(state, batch)
        losses.append(float(metrics.loss))
    return np.asarray(losses), state


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        "baseline",
        "ps_memvir",
        "ps_memvir_proxy_anchor",
        "ps_memvir_soft_triple",
        "manifold_mixup",
        "xbm_multi_similarity",
    ],
)
def test_losses_are_the_same_on_any_number_of_devices(images, variant):
    # In a deep network, rounding changes the sign of an activation every few steps, and a high
    # learning rate carries this into the loss: hence a shallow network at the official rates. The 6
    # classes are not divisible by 4 and 8.
    rates = {"optimizer__learning_rate": 1e-4, "optimizer__proxy_learning_rate": 1e-2}
    config = tiny.config(images, variant, batch_size=16, epochs=7, **rates, **tiny.RESNET)
    alone, _ = losses_of_run(config, devices=1, steps=14)
    assert len(set(alone)) == 14
    for devices in (2, 4, 8):
        together, state = losses_of_run(config, devices=devices, steps=14)
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        split_arrays = []
        if "proxies" in state.params:
            moments = [optax.tree.get(state.opt_state, name)["proxies"] for name in ("mu", "nu")]
            split_arrays = [state.params["proxies"], *moments]
        if state.memory is not None:
            split_arrays += jax.tree.leaves(state.memory._replace(steps=None))
        for x in split_arrays:
            assert {shard.data.size for shard in x.addressable_shards} == {x.size // devices}


@pytest.mark.slow
def test_losses_in_bfloat16_agree_on_several_devices_to_its_rounding(images):
    rates = {"optimizer__learning_rate": 1e-4, "optimizer__proxy_learning_rate": 1e-2}
    half = {"model__dtype": "bfloat16"} | rates | tiny.RESNET
    config = tiny.config(images, "ps_memvir", batch_size=16, epochs=7, **half)
    alone, _ = losses_of_run(config, devices=1, steps=14)
    together, _ = losses_of_run(config, devices=8, steps=14)
    error = np.abs(together / alone - 1).max()
    assert 1e-6 < error < 1e-3


@pytest.mark.slow
def test_a_checkpoint_is_restored_on_another_number_of_devices(images, tmp_path):
    # The 6 classes are padded to 8 on 4 devices.
    config = tiny.config(images, "ps_memvir_soft_triple", batch_size=16, **CONV4)

    def built_on(devices):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        return builder.build(parse(config), mesh, data.InspectionReport({}, {}))

    before = built_on(4)
    state = before.init()
    for _, batch in device_batches(before, 0, 7):
        state, _ = before.take_step(state, batch)
    assert int(state.memory.steps) > 0
    with checkpoint.Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(7, state, None)
    losses = []
    for devices in (4, 1, 8):
        built = built_on(devices)
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            state = checkpoints.restore(7, built.abstract_state)
        classes = {1: 6, 4: 8, 8: 8}[devices]
        assert len(state.params["proxies"]) == classes * 10
        assert not state.params["proxies"][60:].any()
        for _, batch in device_batches(built, 7, 10):
            state, metrics = built.take_step(state, batch)
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.slow
def test_first_losses_of_a_deep_network_are_the_same_on_any_number_of_devices():
    # Later losses differ, see above: by 6e-5 after 20 steps of a narrow ResNet-18.
    config = glyphs.get_config("ps_memvir")
    config.update_from_flattened_dict(
        {"model.backbone": "resnet18", "model.stem": "small", "model.width": 8}
        | {"batch_size": 32, "optimizer.learning_rate": 1e-4}
    )
    alone, _ = losses_of_run(config, devices=1, steps=4)
    together, _ = losses_of_run(config, devices=8, steps=4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_regularisers_change_the_loss_from_their_first_step_on(images):
    losses = {
        variant: losses_of_run(tiny.config(images, variant), devices=1, steps=8)[0]
        for variant in ("baseline", "ps", "memvir")
    }
    assert losses["ps"][0] != losses["baseline"][0]
    # The warm-up is an epoch of 4 steps; two steps later there is the first virtual class.
    np.testing.assert_array_equal(losses["memvir"][:6], losses["baseline"][:6])
    assert losses["memvir"][6] != losses["baseline"][6]


def test_the_seed_determines_the_run(images):
    first, first_state = losses_of_run(tiny.config(images, "ps", seed=1), devices=1, steps=3)
    same, same_state = losses_of_run(tiny.config(images, "ps", seed=1), devices=1, steps=3)
    other, _ = losses_of_run(tiny.config(images, "ps", seed=2), devices=1, steps=3)
    np.testing.assert_array_equal(first, same)
    chex.assert_trees_all_equal(first_state, same_state)
    assert (first != other).all()


def test_a_nonfinite_step_changes_nothing(images):
    mesh = sharding.make_mesh(jax.devices()[:2])
    config = tiny.config(images, "ps_memvir_proxy_anchor", optimizer__name="rmsprop")
    built = builder.build(parse(config), mesh)
    compiled = built.take_step

    def as_float(batch):
        return batch | {"image": batch["image"].astype(np.float32)}

    state = built.init()
    # The warm-up has 4 steps; the memory is full 6 steps later.
    *before, last = [as_float(batch) for _, batch in device_batches(built, 0, 12)]
    for batch in before:
        state, _ = compiled(state, batch)
    kept, bad = jax.tree.map(lambda x: x.copy(), (state, last))
    bad["image"] = bad["image"].at[3, 0, 0, 0].set(np.nan)

    skipped, metrics = compiled(jax.tree.map(lambda x: x.copy(), state), bad)
    assert np.isnan(metrics.loss)
    assert np.isnan(metrics.gradient_norms).any() and np.isnan(metrics.parameter_norms).any()
    assert int(skipped.step) == int(kept.step) + 1 == 12
    assert (int(skipped.skipped.total), int(skipped.skipped.in_a_row)) == (1, 1)
    for part in ("params", "batch_stats", "opt_state", "metrics"):
        chex.assert_trees_all_equal(getattr(skipped, part), getattr(kept, part))

    # The ring may already contain the entry of the skipped step, which the next step overwrites. So
    # the next step is compared, bit for bit, with the one without a skipped step.
    again = skipped._replace(step=kept.step, skipped=kept.skipped)
    again, _ = compiled(jax.tree.map(lambda x: x.copy(), again), last)
    taken, metrics = compiled(state, last)
    assert np.isfinite(metrics.loss) and int(taken.memory.steps) == 8
    chex.assert_trees_all_equal(again, taken)


def test_skipped_steps_count_for_schedules_but_not_for_adam(images):
    """Epoch 2, from step 4 on, trains the backbone and nearly stops the proxies."""
    config = tiny.config(
        images,
        optimizer__frozen_epochs=1,
        optimizer__decay_epochs=(2,),
        optimizer__decay_rate=1e-4,
        optimizer__learning_rate=1.0,
        optimizer__proxy_learning_rate=1.0,
        optimizer__weight_decay=0.0,
        optimizer__eps=1e-12,
    )
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = builder.build(parse(config), mesh)
    compiled = built.take_step
    states = [built.init()]
    for done, batch in device_batches(built, 0, 5):
        bad = np.nan if done in (1, 3) else 1.0
        batch["image"] = batch["image"].astype(np.float32).at[0, 0, 0, 0].multiply(bad)
        state, _ = compiled(jax.tree.map(lambda x: x.copy(), states[-1]), batch)
        states.append(state)
    assert int(states[-1].skipped.total) == 2

    # An update of Adam is about as large as the learning rate, for any gradient.
    def largest_update(part):
        before, after = (optax.tree.get(state.params, part) for state in states[-2:])
        changes = jax.tree.map(lambda x, y: abs(x - y).max(), before, after)
        return max(jax.tree.leaves(changes))

    ratio = largest_update("proxies") / built.learning_rate(4)[1]
    assert built.learning_rate(4)[1] == 1e-4 and 0.1 < ratio < 3
    ratio = largest_update("backbone") / built.learning_rate(4)[0]
    # The first update of the backbone, by Adam's own count, as in torch.
    assert 0.9 < ratio < 1.1
    counts = optax.tree.get_all_with_path(states[-1].opt_state, "count")
    assert sorted(int(count) for _, count in counts) == [1, 3]


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scales(images):
    config = tiny.config(images, model__freeze_bn=True)
    before = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1])).init()
    _, after = losses_of_run(config, devices=1, steps=2)
    chex.assert_trees_all_equal(before.batch_stats, after.batch_stats)
    scales = [state.params["embedder"]["backbone"]["bn1"]["scale"] for state in (before, after)]
    assert (scales[0] != scales[1]).all()


@pytest.mark.parametrize("epochs", [0, 1])
def test_only_frozen_scales_and_biases_do_not_train(images, epochs):
    settings = {"model__freeze_bn": True, "model__freeze_bn_affine": True, **CONV4}
    config = tiny.config(images, optimizer__frozen_epochs=epochs, **settings)
    before = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1])).init()
    # An epoch has 4 steps.
    _, after = losses_of_run(config, devices=1, steps=5)
    chex.assert_trees_all_equal(before.batch_stats, after.batch_stats)
    first, last = (
        flax.traverse_util.flatten_dict(state.params, sep="/") for state in (before, after)
    )
    unchanged = {path for path in first if (first[path] == last[path]).all()}
    norms = {f"embedder/backbone/bn{i}/{x}" for i in range(1, 5) for x in ("scale", "bias")}
    assert unchanged == norms


FROM_LAYER2 = {"model__train_from": "layer2", **tiny.RESNET}


@pytest.mark.parametrize("cache", ["none", "device"])
def test_colours_change_inside_the_step_for_images_of_both_caches(images, cache):
    config = tiny.config(images, data__cache=cache)
    plain, bright = [], []
    for strength, found in ((0.0, plain), (0.9, bright)):
        config.data.augmentation.brightness = strength
        built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:2]))
        _, batch = next(device_batches(built, 0, 1))
        with jax.set_mesh(built.mesh):
            made = jax.jit(built.step_config.images)(batch, jax.random.key(0))
        assert made.dtype == np.uint8 and made.sharding.is_equivalent_to(
            sharding.batch_sharding(built.mesh), made.ndim
        )
        found.extend(np.asarray(made).astype(np.float64))
    factors = []
    for before, after in zip(plain, bright, strict=True):
        kept = (after > 0) & (after < 255)
        factor = (after[kept] / before[kept]).mean()
        np.testing.assert_allclose(after[kept], factor * before[kept], atol=1.5)
        factors.append(factor)
    assert 0.1 <= min(factors) < 0.8 and 1.2 < max(factors) <= 1.95


def test_the_average_of_the_network_follows_its_formula(images):
    config = tiny.config(images, optimizer__average_decay=0.3, model__freeze_bn=False)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()
    expected = jax.device_get(network_variables(state))
    chex.assert_trees_all_equal(expected["params"], jax.device_get(state.params["embedder"]))
    for done, batch in device_batches(built, 0, 6):
        if done == 3:
            batch["label"] = np.full_like(batch["label"], 10**6)
        state, metrics = built.take_step(state, batch)
        assert bool(metrics.skipped.in_a_row) == (done == 3)
        if done == 3:
            continue
        decay = min(0.3, done / (9 + done))
        now = {"params": state.params["embedder"], "batch_stats": state.batch_stats}
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            expected,
            jax.device_get(now),
        )
    chex.assert_trees_all_close(network_variables(state), expected, rtol=1e-5, atol=1e-7)


def test_what_lies_below_train_from_is_frozen(images):
    config = tiny.config(images, optimizer__weight_decay=0.1, **FROM_LAYER2)
    before = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1])).init()
    _, after = losses_of_run(config, devices=1, steps=3)
    params, statistics = (
        [flax.traverse_util.flatten_dict(tree, sep="/") for tree in trees]
        for trees in zip(
            (before.params["embedder"], before.batch_stats),
            (after.params["embedder"], after.batch_stats),
            strict=True,
        )
    )
    for first, last in (params, statistics):
        changed = {path for path in first if (first[path] != last[path]).any()}
        assert changed == {x for x in first if x.startswith(("backbone/layer2", "head"))}
    kept = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(after.opt_state)]
    assert any("layer2.0" in path for path in kept)
    assert not any("layer1.0" in path or "conv1'" in path.split("layer")[0] for path in kept)


@pytest.mark.slow
def test_the_first_step_of_the_trained_part_is_that_of_the_whole_network(images):
    settings = tiny.RESNET | {"model__freeze_bn": True, "micro_batches": 2}
    _, whole = losses_of_run(tiny.config(images, "ps", **settings), devices=1, steps=1)
    for train_from in ("layer1", "head"):
        config = tiny.config(images, "ps", model__train_from=train_from, **settings)
        _, part = losses_of_run(config, devices=1, steps=1)
        built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
        trained, fixed = split(part.params, built.network.fixed)
        expected, _ = split(whole.params, fixed)
        assert fixed
        chex.assert_trees_all_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_the_frozen_part_has_no_backward_pass(images):
    def operations(train_from):
        config = tiny.config(images, model__train_from=train_from, **CONV4, model__width=16)
        built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
        step_program = built.take_step.lower(
            built.abstract_state, builder.abstract_batch(built)
        ).compile()
        embed = built.network.embed.lower(
            built.network.variables_shape,
            jax.ShapeDtypeStruct((8, tiny.SIZE, tiny.SIZE, 3), np.uint8),
        ).compile()
        return step_program.cost_analysis()["flops"] / embed.cost_analysis()["flops"]

    assert operations("all") > 2
    assert operations("head") < 1.5


def test_bfloat16_computes_losses_near_those_of_float32(images):
    exact, _ = losses_of_run(tiny.config(images), devices=1, steps=3)
    config = tiny.config(images, model__dtype="bfloat16")
    rounded, state = losses_of_run(config, devices=1, steps=3)
    np.testing.assert_allclose(rounded, exact, rtol=0.1)
    assert (rounded != exact).all()
    chex.assert_trees_all_equal_dtypes(
        state.params,
        builder.build(parse(tiny.config(images)), sharding.make_mesh(jax.devices()[:1]))
        .init()
        .params,
    )


def masked_state(state):
    """Returns the optimizer state of the backbone."""

    def is_masked(x):
        return isinstance(x, optax.ConditionallyMaskState)

    states = filter(is_masked, jax.tree.leaves(state.opt_state, is_leaf=is_masked))
    return next(states).inner_state


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_a_frozen_backbone_and_its_optimizer_state_do_not_change(images, name):
    settings = {"optimizer__frozen_epochs": 1, "optimizer__name": name}
    config = tiny.config(images, **settings)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()
    states = [jax.device_get(state)]
    for _, batch in device_batches(built, 0, 5):
        state, _ = built.take_step(state, batch)
        states.append(jax.device_get(state))
    # An epoch has 4 steps.
    start, frozen, thawed = states[0], states[4], states[5]
    chex.assert_trees_all_equal(
        frozen.params["embedder"]["backbone"], start.params["embedder"]["backbone"]
    )
    chex.assert_trees_all_equal(frozen.batch_stats, start.batch_stats)
    assert (
        frozen.params["embedder"]["head"]["kernel"] != start.params["embedder"]["head"]["kernel"]
    ).any()
    assert (frozen.params["proxies"] != start.params["proxies"]).any()
    chex.assert_trees_all_equal(*(masked_state(state) for state in (frozen, start)))

    before, after = (
        state.params["embedder"]["backbone"]["conv1"]["kernel"] for state in (frozen, thawed)
    )
    assert (before != after).any()
    if name == "adam":
        # Torch counts updates per parameter: the first one of the backbone has the size of a first.
        rate = config.optimizer.learning_rate
        assert 0.5 * rate < abs(after - before).max() < 1.5 * rate


CONV4 = {"model__backbone": "conv4", "model__stem": None}


def compiled_on(config, devices, rows):
    """Returns the step compiled for some numbers of devices and rows."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    built = builder.build(parse(config), mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((rows, tiny.SIZE, tiny.SIZE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    function = jax.jit(
        lambda state, batch: step.train_step(built.step_config, state, batch),
        in_shardings=(sharding.shardings_of(built.abstract_state), sharding.batch_sharding(mesh)),
    )
    with jax.set_mesh(mesh):
        return function.lower(built.abstract_state, batch).compile()


def test_the_finite_check_of_a_step_is_computed_once(images):
    config = tiny.config(images, **tiny.RESNET)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    arrays = len(jax.tree.leaves(built.abstract_state.params))
    conjunctions = compiled_on(config, devices=1, rows=8).as_text().count(" and(")
    # Recomputed for each array, they would be several times the square of the number of arrays.
    assert conjunctions < arrays**2 or jax.__version_info__ < (0, 12)


def test_micro_batches_have_the_gradients_of_the_whole_batch(images):
    # Synthetic and virtual classes combine embeddings of different micro-batches.
    config = tiny.config(images, "ps_memvir", batch_size=16, model__freeze_bn=True, **CONV4)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()

    def gradients(count):
        step_config = built.step_config._replace(micro_batches=count, memory_warmup_steps=0)

        def loss_fn(params, state, batch):
            return step.objective(step_config, params, state, batch, jax.random.key(0))

        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

    whole, in_micro_batches = gradients(1), gradients(4)
    for _, batch in device_batches(built, 0, 4):  # The gap is one step.
        before = state
        (loss, (_, memory)), expected = whole(state.params, state, batch)
        state = state._replace(memory=memory)
    (accumulated, _), computed = in_micro_batches(before.params, before, batch)
    np.testing.assert_allclose(accumulated, loss, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


def test_batch_statistics_are_updated_by_each_micro_batch(images):
    built = builder.build(parse(tiny.config(images)), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()
    batch_stats, params = state.batch_stats, state.params["embedder"]
    pixels = jax.random.randint(jax.random.key(0), (8, 4, 4, 3), 0, 256)
    step_config = built.step_config._replace(micro_batches=2)
    embeddings, updated = step.embed(step_config, params, batch_stats, pixels, jax.random.key(1))
    for part in (0, 1):
        expected, updates = step_config.embedder.apply(
            {"params": params, "batch_stats": batch_stats},
            pixels[part::2],
            train=True,
            mutable=["batch_stats"],
        )
        batch_stats = updates["batch_stats"]
        np.testing.assert_allclose(embeddings[part::2], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(updated, batch_stats, rtol=1e-6)


def test_micro_batches_are_the_same_on_any_number_of_devices(images):
    config = tiny.config(images, batch_size=16, micro_batches=2)
    alone, _ = losses_of_run(config, devices=1, steps=3)
    together, _ = losses_of_run(config, devices=4, steps=3)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.slow
def test_stochastic_depth_is_the_same_on_any_number_of_devices(images):
    settings = {"batch_size": 16, "micro_batches": 2, "model__freeze_bn": True} | tiny.RESNET
    config = tiny.config(images, model__drop_path=0.5, **settings)
    alone, _ = losses_of_run(config, devices=1, steps=3)
    together, _ = losses_of_run(config, devices=8, steps=3)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_seed_step_and_micro_batch_determine_which_branches_are_dropped(images):
    frozen = {"model__freeze_bn": True} | tiny.RESNET
    config = tiny.config(images, model__drop_path=0.8, batch_size=16, **frozen)
    built = builder.build(parse(config), sharding.make_mesh(jax.devices()[:1]))
    state = built.init()
    # Equal images: their embeddings tell which of them went through the second block.
    batch = {"image": np.full((16, 16, 16, 3), 99, np.uint8), "label": np.zeros(16, np.int32)}
    batch = jax.tree.map(jax.numpy.asarray, batch)

    @jax.jit
    def embedded(key):
        step_config = built.step_config._replace(micro_batches=2)
        params, inputs = state.params["embedder"], batch["image"]
        return step.embed(step_config, params, state.batch_stats, inputs, key)[0]

    first, again, other = (embedded(jax.random.key(seed))[:, 0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)

    def dropped(x):
        return np.abs(x - np.median(x)) < 1e-6

    assert 8 < dropped(first).sum() < 16
    assert (dropped(first) != dropped(other)).any()
    assert (dropped(first[::2]) != dropped(first[1::2])).any()
    # A step that is taken again, as after a resume, drops the same branches; another step others.
    compiled = built.take_step
    copies = [jax.tree.map(lambda x: x.copy(), state) for _ in range(2)]
    taken = [float(compiled(copy, batch)[1].loss) for copy in copies]
    later = compiled(state._replace(step=state.step + 1), batch)[1].loss
    assert taken[0] == taken[1] != float(later)


@pytest.mark.slow
def test_micro_batches_need_less_memory_and_move_no_images(images):
    whole, parts = (
        compiled_on(tiny.config(images, batch_size=16, micro_batches=count, **CONV4), 4, rows=256)
        for count in (1, 4)
    )
    memory = [x.memory_analysis().temp_size_in_bytes for x in (whole, parts)]
    # The CPU compiler of JAX 0.10 does not keep the order of the micro-batches.
    assert (memory[1] < 0.5 * memory[0]) == (jax.__version_info__ >= (0, 12)), memory
    moves = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    lines = [line for line in parts.as_text().splitlines() if any(f"{x}(" in line for x in moves)]
    assert not [line for line in lines if f"{tiny.SIZE},{tiny.SIZE},3]" in line]


def test_a_micro_batch_that_devices_cannot_share_is_refused(images):
    config = tiny.config(images, batch_size=8, micro_batches=4)
    with pytest.raises(
        ValueError, match=r"in 4 micro-batches \(config.micro_batches\); .* multiple of 16"
    ):
        builder.build(parse(config), sharding.make_mesh(jax.devices()[:4]))


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({}, ""),
        ({"model.train_from": "head"}, "hardly ever improved retrieval"),
        ({"memvir.step_gap": 3}, "in 8 steps, but the run has 8 after the warm-up"),
        ({"memvir.step_gap": 3, "memvir.growth": "at_once"}, "so the virtual classes never join"),
    ],
)
def test_settings_with_which_memvir_has_no_effect_or_a_bad_one_warn(
    images, settings, warning, caplog
):
    # An epoch has 4 steps, and the first of three is the warm-up.
    config = tiny.config(images, "memvir", epochs=3)
    config.update_from_flattened_dict({"memvir.num_steps": 2, "memvir.step_gap": 2} | settings)
    builder.build(parse(config), sharding.make_mesh())
    assert warning in caplog.text and bool(warning) == bool(caplog.text)
