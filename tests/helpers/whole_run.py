"""Recorded training runs of the official programs, and runs of dml_jax from the same start.

`golden/whole_run.npz` was recorded from the unmodified official programs of Proxy Synthesis and
MemVir in PyTorch on a CPU: five cases of 6 epochs of 4 steps each. It contains the images, and for
each case the official arguments, the initial head and proxies, the order of the images, the mixing
weights and partners of Proxy Synthesis, and the results.

The weights of the backbone are not stored: `backbone` generates each tensor from its name.
Convolutions and the running statistics after them are scaled by 256, which does not change the
function and makes the updates of Adam small relative to the weights; otherwise training would
amplify rounding errors.
"""

import json
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dml_jax._utils import sharding
from dml_jax.configs import cars196
from dml_jax.training import builder
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables

REFERENCE = dict(np.load(Path(__file__).parents[1] / "golden" / "whole_run.npz"))
ABOUT = json.loads(str(REFERENCE["about"]))

# Official arguments, and the corresponding settings.
LOSSES = {"normsoftmax": "norm_softmax", "proxynca": "proxy_nca"}
SETTINGS = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "input_size": "data.image_size",
    "n_instance": "data.n_instance",
    "backbone": "model.backbone",
    "dim": "model.dim",
    "freeze_BN": "model.freeze_bn",
    "scale": "loss.scale",
    "optimizer": "optimizer.name",
    "modellr": "optimizer.learning_rate",
    "centerlr": "optimizer.proxy_learning_rate",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "decay_rate": "optimizer.decay_rate",
    "warmup": "optimizer.frozen_epochs",
}
SETTINGS_OF_METHOD = {
    "baseline": {},
    "ps": {"ps_mu": "proxy_synthesis.ratio", "ps_alpha": "proxy_synthesis.alpha"},
    "memvir": {
        "mem_num_step": "memvir.num_steps",
        "mem_step_gap": "memvir.step_gap",
        "warm_epoch": "memvir.warmup_epochs",
    },
}
POOLINGS = {"GAP": "gap", "GAP,GMP": "gap+gmp"}


def recorded(case, name):
    return REFERENCE[f"{case}_{name}"]


def backbone():
    """Returns all tensors of the backbone by PyTorch name."""
    return {key: _tensor(key, shape) for key, shape in ABOUT["backbone_tensors"].items()}


def _normal(key, shape, seed):
    return np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape)


def _tensor(key, shape):
    x = _normal(key, shape, ABOUT["seed"]).astype(np.float32)
    # This convolution is not scaled: it follows a pool, whose zero padding would scale too.
    scale = np.float32(1 if key.startswith("inception_5b_pool_proj") else ABOUT["convolutions"])
    tenth = np.float32(0.1) * x
    if key.endswith("running_var"):
        return scale**2 * (1 + abs(tenth))
    if key.endswith("_bn.bias"):
        return tenth
    if key.endswith(("running_mean", "bias")):
        return scale * tenth
    if len(shape) == 1:
        return 1 + tenth
    kernel = scale * x * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    # Pixel values range up to 255.
    return kernel / np.float32(64) if key == "conv1_7x7_s2.weight" else kernel


def write_images(root):
    """Writes the images as root/train/CLASS/*.png and root/test/CLASS/*.png, in recorded order."""
    for split, prefix in (("train", ""), ("test", "test_")):
        labelled = zip(REFERENCE[f"{prefix}images"], REFERENCE[f"{prefix}labels"], strict=True)
        for i, (pixels, label) in enumerate(labelled):
            directory = root / split / f"class{label:02}"
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(directory / f"{i:03}.png")


def config(case, root, weights):
    """Returns the CARS196 config with the arguments of an official run, for images in `root`."""
    args, decay_epochs = (ABOUT["cases"][case][name] for name in ("args", "decay_epochs"))
    method = "ps" if args.get("ps_mu") else "memvir" if args.get("memvir") else "baseline"
    made = cars196.get_config(f"{method}_{LOSSES[args['loss'].replace('_', '').lower()]}")
    settings = SETTINGS | SETTINGS_OF_METHOD[method]
    made.update_from_flattened_dict(
        {ours: args[theirs] for theirs, ours in settings.items() if theirs in args}
        | {
            "data.name": "folder",
            "data.root": str(root),
            "data.resize": args["input_size"],
            "data.num_workers": 0,
            "model.pretrained": str(weights),
            "model.pooling": POOLINGS[args["pooling_type"]],
            "optimizer.decay_epochs": tuple(decay_epochs),
            "evaluation.every_epochs": 1,
        }
    )
    return made


def draw(case, key, labels, **settings):
    """Returns the recorded weight and partners of a batch; replaces `proxy_synthesis.draw`."""
    del key, settings
    steps = recorded(case, "labels")
    assert len(np.unique(steps, axis=0)) == len(steps)  # Labels identify the step.
    step = jnp.argmax((jnp.asarray(steps, jnp.int32) == labels[None]).all(axis=1))
    lam, partner = recorded(case, "lam"), recorded(case, "partner")
    return jnp.asarray(lam, jnp.float32)[step][None], jnp.asarray(partner, jnp.int32)[step][None]


class Run(NamedTuple):
    """The results of a run, named as in the recorded runs.

    Attributes:
        losses: `[steps]`.
        learning_rates: `[steps, 2]`, of the network and of the proxies.
        metrics: `[epochs, 3]`, R@1, RP and MAP@R.
        grad_norm: gradient norms `[steps]` by part of the parameters.
        features: mean features of the `first` and of the `last` batch, before the step.
        embeddings: embeddings of these batches.
        eval_embeddings: embeddings of the test images after each epoch.
        before: all parameters before the first step.
        after: all parameters after the last step.
    """

    losses: np.ndarray
    learning_rates: np.ndarray
    metrics: np.ndarray
    grad_norm: dict
    features: dict
    embeddings: dict
    eval_embeddings: np.ndarray
    before: dict
    after: dict


def build(case, root, weights):
    """Returns the experiment of a case."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = builder.build(parse(config(case, root, weights)), mesh)
    assert built.steps_per_epoch == ABOUT["steps_per_epoch"]
    for split, name in (("train", "labels"), ("test", "test_labels")):
        np.testing.assert_array_equal(built.sources[split].labels, REFERENCE[name])
    return built


def initial(case):
    """Returns the recorded head and proxies before the first step."""
    return {
        "head_weight": recorded(case, "head_weight_init"),
        "head_bias": recorded(case, "head_bias_init"),
        "proxies": recorded(case, "proxies_init"),
    }


def train(case, built, start):
    """Runs the recorded steps from some head and proxies, in the form of `initial`."""
    state = _with(built.init(), start)
    before, stats = jax.device_get((state.params, state.batch_stats))
    order, labels = recorded(case, "order"), recorded(case, "labels").astype(np.int32)
    losses, norms, metrics, tests, features, embeddings = [], [], [], [], {}, {}
    for t in range(len(order)):
        batch = {"image": REFERENCE["images"][order[t]], "label": labels[t]}
        if t in (0, len(order) - 1):
            name = "last" if t else "first"
            variables = network_variables(state)
            features[name] = _features(built.network.embed, variables, batch["image"])
            embeddings[name] = np.asarray(built.network.embed(variables, batch["image"]))
        state, step_metrics = built.take_step(state, sharding.put_batch(built.mesh, batch))
        losses.append(float(step_metrics.loss))
        norms.append(step_metrics.gradient_norms)
        if (t + 1) % built.steps_per_epoch == 0:
            made = built.evaluator.embed(network_variables(state), "test")
            scores = built.evaluator.score(made)
            metrics.append([scores[name] for name in ("recall@1", "r_precision", "map@r")])
            tests.append(made["test"])
    after, stats_after = jax.device_get((state.params, state.batch_stats))
    jax.tree.map(np.testing.assert_array_equal, stats_after, stats)  # All cases freeze them.
    by_array = jax.tree.unflatten(jax.tree.structure(after), np.transpose(norms))
    backbone_norms = jax.tree.leaves(by_array["embedder"]["backbone"])
    return Run(
        losses=np.array(losses),
        learning_rates=np.array([built.learning_rate(t) for t in range(len(order))]),
        metrics=np.array(metrics),
        grad_norm={
            "backbone": np.linalg.norm(backbone_norms, axis=0),
            "head_weight": by_array["embedder"]["head"]["kernel"],
            "head_bias": by_array["embedder"]["head"]["bias"],
            "proxies": by_array["proxies"],
        },
        features=features,
        embeddings=embeddings,
        eval_embeddings=np.array(tests),
        before=before,
        after=after,
    )


def head_and_proxies(params):
    """Returns head and proxies in the layout of the official programs."""
    head = params["embedder"]["head"]
    return {
        "head_weight": head["kernel"].T,
        "head_bias": head["bias"],
        "proxies": params["proxies"],
    }


def _with(state, start):
    """Returns the state with another head and other proxies."""
    embedder = state.params["embedder"]
    recorded_start = {
        "embedder": {"kernel": start["head_weight"].T, "bias": start["head_bias"]},
        "proxies": start["proxies"],
    }
    drawn = {"embedder": embedder["head"], "proxies": state.params["proxies"]}
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), recorded_start, drawn)
    params = {"embedder": {**embedder, "head": placed["embedder"]}, "proxies": placed["proxies"]}
    return state._replace(params=params)


def _features(embed, variables, images):
    """Returns the mean of the pooled features over a batch.

    The features are read by `embed` with heads that select some of them at a time.
    """
    width, dim = variables["params"]["head"]["kernel"].shape

    def columns(first):
        head = {"kernel": np.eye(width, dim, -first, np.float32), "bias": np.zeros(dim, np.float32)}
        return embed({**variables, "params": {**variables["params"], "head": head}}, images)

    return np.concatenate([columns(i) for i in range(0, width, dim)], axis=1).mean(0)


def error(ours, reference):
    """Returns the norm of the difference relative to the norm of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def unit(vectors):
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)


def errors(case, run):
    """Returns the errors of a run by kind; see `test_whole_run.TOLERANCES`."""
    of = partial(recorded, case)
    before, after = (head_and_proxies(params) for params in (run.before, run.after))
    changes = {name: after[name] - before[name] for name in after}
    expected_changes = {name: of(name) - of(f"{name}_init") for name in after}

    def heads(ours, reference):
        return np.max([error(ours[x], reference[x]) for x in ("head_weight", "head_bias")])

    def gradients(*names):
        norms = [(run.grad_norm[name], of(f"grad_norm_{name}")) for name in names]
        # The official programs do not compute gradients of a frozen backbone.
        return np.max([abs(x[y > 0] / y[y > 0] - 1).max() for x, y in norms])

    return {
        "learning rates": abs(run.learning_rates / of("learning_rates") - 1).max(),
        "metrics": _metrics_error(run, of("metrics"), of("eval_embeddings")),
        "losses": abs(run.losses / of("losses") - 1).max(),
        "first features": error(run.features["first"], of("features_first")),
        "first embeddings": error(unit(run.embeddings["first"]), unit(of("embeddings_first"))),
        "last features": error(run.features["last"], of("features_last")),
        "last embeddings": error(unit(run.embeddings["last"]), unit(of("embeddings_last"))),
        "test embeddings": error(unit(run.eval_embeddings[-1]), of("eval_embeddings")),
        "gradients of head and proxies": gradients("head_weight", "head_bias", "proxies"),
        "gradients of the backbone": gradients("backbone"),
        "proxies": error(after["proxies"], of("proxies")),
        "head": heads(after, {name: of(name) for name in after}),
        "change of proxies": error(changes["proxies"], expected_changes["proxies"]),
        "change of head": heads(changes, expected_changes),
        **_backbone_errors(case, run),
    }


def _metrics_error(run, official, last_embeddings):
    """Returns the largest difference of metrics beyond the effect of rounding.

    Rounding decides the order of images with nearly equal similarity to a query. Metrics increase
    with the similarities within classes, so raised and lowered similarities give bounds.
    """
    last, expected = (x @ x.T for x in (unit(run.eval_embeddings[-1]), unit(last_embeddings)))
    shift = 2 * abs(last - expected).max()
    return np.max(
        [
            abs(scores - np.clip(scores, _scores(embeddings, -shift), _scores(embeddings, shift)))
            for *both, embeddings in zip(run.metrics, official, run.eval_embeddings, strict=True)
            for scores in both
        ]
    )


def _scores(embeddings, raised):
    """Returns R@1, RP and MAP@R of the test images, with raised similarities within classes."""
    labels, vectors = REFERENCE["test_labels"], unit(embeddings)
    same = labels[:, None] == labels
    similarities = vectors @ vectors.T + raised * same
    np.fill_diagonal(similarities, -np.inf)
    hits = np.take_along_axis(same, np.argsort(-similarities), axis=1)
    relevant = same.sum(axis=1, keepdims=True) - 1
    ranks = np.arange(1, len(labels) + 1)
    counted = hits * (ranks <= relevant) / relevant
    precisions = np.cumsum(hits, axis=1) / ranks
    return hits[:, 0].mean(), counted.sum(1).mean(), (counted * precisions).sum(1).mean()


def _backbone_errors(case, run):
    """Returns errors of the change of the backbone, by its products with random vectors."""
    before, after = (
        flax.traverse_util.flatten_dict(params["embedder"]["backbone"])
        for params in (run.before, run.after)
    )
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    index = {name: i for i, name in enumerate(sorted(ABOUT["backbone_tensors"]))}
    found = {"change of batch norms": [], "change of convolutions": []}
    for path in before:
        name = ".".join((*path[:-1], leaves[path[-1]]))
        change = after[path].astype(np.float64) - before[path]
        change = change.transpose(3, 2, 0, 1) if change.ndim == 4 else change
        probe = (change * _normal(name, change.shape, ABOUT["seed"] + 7)).sum()
        kind = "change of batch norms" if "_bn." in name else "change of convolutions"
        difference = probe - recorded(case, "backbone_change_probes")[index[name]]
        found[kind].append((difference, recorded(case, "backbone_change_norms")[index[name]]))
    return {kind: np.divide(*np.linalg.norm(both, axis=0)) for kind, both in found.items()}
