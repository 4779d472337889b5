"""Maps of training classes with the synthetic and virtual classes that regularisers add.

A map shows embeddings and proxies of a few training classes, the mixtures that Proxy Synthesis
makes of them, and their embeddings and proxies in MemVir's memory, like the figures of the papers.
Images of a few test classes show where unseen classes are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int64

from dml_jax import data, losses, memvir
from dml_jax.inference import mixtures, trained
from dml_jax.inference.trained import TrainingState
from dml_jax.report import projection
from dml_jax.report.thumbnails import Thumbnail
from dml_jax.retrieval import exact
from dml_jax.training.builder import Experiment

KINDS = (
    "image",
    "proxy",
    "synthetic embedding",
    "synthetic proxy",
    "remembered embedding",
    "remembered proxy",
    "test image",
)
"""The kinds of points on a map."""

_CLASSES = 8
_TEST_CLASSES = 4
_IMAGES = 20
_AGES = 20
_STEPS = 8


class _Points(NamedTuple):
    """Points of one kind; see `TrainingMap` for `second` and `age`."""

    kind: str
    vectors: Float32[np.ndarray, "n d"]
    label: Int64[np.ndarray, " n"]
    second: Int64[np.ndarray, " n"]
    age: Int64[np.ndarray, " n"]


class TrainingMap(NamedTuple):
    """A map of a few training classes, with images of a few test classes.

    Attributes:
        positions: the position of each point, in 0..1.
        kind: the kind of each point, an index of `KINDS`.
        label: the class of each point, an index of `classes`.
        second: the second class of a synthetic point; -1 for other points.
        age: steps since a point entered the memory; 0 for points outside it.
        classes: names of the training classes, then of the test classes.
        thumbnails: the images of the points of the kinds "image" and "test image", which come first
            in this order.
    """

    positions: Float64[np.ndarray, "n 2"]
    kind: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]
    second: Int64[np.ndarray, " n"]
    age: Int64[np.ndarray, " n"]
    classes: list[str]
    thumbnails: list[Thumbnail]


def compute(built: Experiment, state: TrainingState) -> TrainingMap | None:
    """Returns the map of a run at a checkpoint; None for a run without a regulariser.

    Args:
        built: the experiment of the run.
        state: its state at the checkpoint, with MemVir's memory.
    """
    config = built.config
    if not (config.proxy_synthesis.ratio or config.memvir.num_steps):
        return None
    loss = losses.of_proxies(built.step_config.loss)
    remembered = None if state.memory is None else _entries(state.memory)
    train, test = built.sources["train"], built.sources["test"]
    chosen = _choose(train.labels, _CLASSES, remembered)
    images = _images_of(train, chosen)
    embeddings = jnp.asarray(trained.embed_some(built, state, train, images))
    per_class = loss.proxies_per_class
    own = jnp.asarray(state.proxies.reshape(len(train.class_names), -1)[chosen])
    own = own.reshape(len(chosen) * per_class, -1)
    labels = np.searchsorted(chosen, train.labels[images])
    of_test = _choose(test.labels, _TEST_CLASSES)
    test_images = _images_of(test, of_test)
    test_rows, _ = loss.prepare(
        jnp.asarray(trained.embed_some(built, state, test, test_images)), own
    )
    test_labels = len(chosen) + np.searchsorted(of_test, test.labels[test_images])
    image_points, proxy_points = _current(built, embeddings, own, labels)
    points = [image_points, _points("test image", test_rows, test_labels), proxy_points]
    if built.step_config.mixing.ratio:
        points += _synthetic(built, embeddings, own, labels)
    if remembered is not None:
        unused = {"proxies": "remembered embedding", "embeddings": "remembered proxy"}
        shown = _remembered(remembered, chosen, per_class)
        points += [x for x in shown if x.kind != unused.get(config.memvir.virtual)]
    vectors = exact.unit_rows(np.concatenate([part.vectors for part in points]))
    return TrainingMap(
        positions=projection.project(vectors),
        kind=np.concatenate([np.full(len(x.label), KINDS.index(x.kind)) for x in points]),
        label=np.concatenate([part.label for part in points]),
        second=np.concatenate([part.second for part in points]),
        age=np.concatenate([part.age for part in points]),
        classes=[
            *(train.class_names[c] for c in chosen),
            *(test.class_names[c] for c in of_test),
        ],
        thumbnails=[
            *(Thumbnail(train, int(i)) for i in images),
            *(Thumbnail(test, int(i)) for i in test_images),
        ],
    )


class _Entries(NamedTuple):
    """The entries of MemVir's memory, the latest first."""

    embeddings: Float32[np.ndarray, "steps rows dim"]
    proxies: Float32[np.ndarray, "steps classes pdim"]
    labels: Int64[np.ndarray, "steps rows"]


def _entries(memory: memvir.Memory) -> _Entries:
    """Returns the entries of the memory by age; `memvir` defines the layout of the ring."""
    _, blocks, slots = memory.ring.labels.shape
    done = int(memory.steps)
    # The latest step is still pending; its slot in the ring holds the entry it will replace.
    steps = np.arange(done - 2, max(done - 2 - (blocks * slots - 1), -1), -1)
    block, slot = steps % blocks, steps // blocks % slots

    def ordered(name: str) -> np.ndarray:
        ring, pending = (np.asarray(getattr(x, name)) for x in (memory.ring, memory.pending))
        return np.concatenate([pending[None, ...], np.moveaxis(ring[:, block, slot], 1, 0)])[:done]

    return _Entries(
        ordered("embeddings").astype(np.float32),
        ordered("proxies").astype(np.float32),
        ordered("labels").astype(np.int64),
    )


def _choose(
    labels: np.ndarray, count: int, remembered: _Entries | None = None
) -> Int64[np.ndarray, " classes"]:
    """Returns the classes to show: those with most entries in the memory, or random ones."""
    classes = np.random.default_rng(0).permutation(int(labels.max()) + 1)
    if remembered is not None:
        counts = np.bincount(remembered.labels.ravel(), minlength=len(classes))
        classes = classes[np.argsort(-counts[classes], kind="stable")]
    return np.sort(classes[:count])


def _images_of(
    source: data.Source, classes: Int64[np.ndarray, " classes"]
) -> Int64[np.ndarray, " n"]:
    return np.concatenate([np.flatnonzero(source.labels == c)[:_IMAGES] for c in classes])


def _points(kind: str, vectors: Any, label: Any, second: Any = -1, age: Any = 0) -> _Points:
    label = np.asarray(label, np.int64)
    second, age = (np.broadcast_to(np.int64(x), label.shape) for x in (second, age))
    return _Points(kind, np.asarray(vectors, np.float32), label, second, age)


def _current(
    built: Experiment,
    embeddings: Float[Array, "n d"],
    proxies: Float[Array, "p d2"],
    labels: Int64[np.ndarray, " n"],
) -> list[_Points]:
    loss = losses.of_proxies(built.step_config.loss)
    rows, columns = loss.prepare(embeddings, proxies)
    classes = np.arange(len(columns)) // loss.proxies_per_class
    return [_points("image", rows, labels), _points("proxy", columns, classes)]


def _synthetic(
    built: Experiment,
    embeddings: Float[Array, "n d"],
    proxies: Float[Array, "p d2"],
    labels: Int64[np.ndarray, " n"],
) -> list[_Points]:
    """Returns the mixtures that training steps would make of a batch of the shown images.

    One step mixes all pairs with the same weight. To show several weights, the points are taken
    from several steps.
    """
    loss = losses.of_proxies(built.step_config.loss)
    points = []
    for part in range(_STEPS):
        made = mixtures.of_batch(
            jax.random.key(part),
            embeddings,
            proxies,
            jnp.asarray(labels),
            loss=loss,
            mixing=built.step_config.mixing,
        )
        # For losses with several proxies per class, only the first mixture is shown.
        first_proxies = made.proxies.reshape(len(made.weights), loss.proxies_per_class, -1)[:, 0]
        for kind, vectors, mask in (
            ("synthetic embedding", made.embeddings, made.row_mask),
            ("synthetic proxy", first_proxies, made.class_mask),
        ):
            kept = np.flatnonzero(mask)
            kept = kept[kept % _STEPS == part]
            points.append(_points(kind, vectors[kept], *made.classes[kept].T))
    return points


def _remembered(
    entries: _Entries, chosen: Int64[np.ndarray, " classes"], per_class: int
) -> list[_Points]:
    """Returns all embeddings of the classes in the memory, and their proxies at spaced ages."""
    steps = len(entries.labels)
    age, row = np.nonzero(np.isin(entries.labels, chosen))
    rows = entries.embeddings[age, row]
    at = np.unique(np.linspace(0, steps - 1, min(steps, _AGES)).round().astype(int))
    proxies = entries.proxies[at][:, chosen]
    proxies = proxies.reshape(len(at), len(chosen) * per_class, -1)
    classes = np.tile(np.arange(proxies.shape[1]) // per_class, len(at))
    return [
        _points(
            "remembered embedding",
            rows,
            np.searchsorted(chosen, entries.labels[age, row]),
            age=age + 1,
        ),
        _points(
            "remembered proxy",
            proxies.reshape(len(classes), -1),
            classes,
            age=np.repeat(at + 1, proxies.shape[1]),
        ),
    ]
