"""What a regulariser adds to the space: synthetic classes, and classes as they were remembered.

A few training classes: their images, their proxies, and beside them what Proxy Synthesis mixes of
them or what MemVir's memory holds of them, as in the figures of the two papers.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int64

from dml_jax import data, memvir, proxy_synthesis
from dml_jax._utils import sharding
from dml_jax.evaluation.embedding import embed_images
from dml_jax.report import projection
from dml_jax.report.runs import Run
from dml_jax.report.thumbnails import Thumbnail
from dml_jax.retrieval import exact
from dml_jax.training import builder, checkpoint, run_directory
from dml_jax.training.builder import Experiment
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables

KINDS = (
    "image",
    "proxy",
    "synthetic embedding",
    "synthetic proxy",
    "remembered embedding",
    "remembered proxy",
)
"""What a point of the map stands for, by its number."""

_CLASSES = 8
_IMAGES = 20
_AGES = 20
_STEPS = 8


class _Points(NamedTuple):
    """Some points of one kind; `second` is the other class of a synthetic one, or -1."""

    kind: str
    vectors: Float32[np.ndarray, "n d"]
    label: Int64[np.ndarray, " n"]
    second: Int64[np.ndarray, " n"]
    age: Int64[np.ndarray, " n"]


class TrainingMap(NamedTuple):
    """A map of a few training classes.

    Attributes:
        places: of the points, in 0..1.
        kind: number in `KINDS` of each.
        label: class of each, in `classes`.
        second: the other class of a synthetic point; -1 of any other.
        age: steps since a point was remembered; 0 of any other.
        classes: names of the classes.
        pictures: of the points that are images, which come first.
    """

    places: Float64[np.ndarray, "n 2"]
    kind: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]
    second: Int64[np.ndarray, " n"]
    age: Int64[np.ndarray, " n"]
    classes: list[str]
    pictures: list[Thumbnail]


def draw(run: Run) -> TrainingMap | None:
    """Draws the map of a run with Proxy Synthesis or MemVir, from its last checkpoint.

    Args:
        run: a finished run.

    Returns:
        The map; None for a run with neither, or whose checkpoints are no longer there.
    """
    config = run.config
    if not (config.proxy_synthesis.ratio or config.memvir.num_steps):
        return None
    device = sharding.make_mesh(jax.local_devices()[:1])
    built = builder.build(parse(config), device, run_directory.read_findings(run.folder))
    state = _restore(built, run.folder)
    if state is None:
        return None
    variables, proxies, memory = state
    remembered = None if memory is None else _entries(memory)
    train = built.sources["train"]
    chosen = _choose(train.labels, remembered)
    images = np.concatenate([np.flatnonzero(train.labels == c)[:_IMAGES] for c in chosen])
    source = _some(train, images)
    embeddings = jnp.asarray(embed_images(built.network, variables, source))
    per_class = built.recipe.loss.proxies_per_class
    own = jnp.asarray(proxies.reshape(len(train.class_names), -1)[chosen])
    own = own.reshape(len(chosen) * per_class, -1)
    labels = np.searchsorted(chosen, source.labels)
    points = _actual(built, embeddings, own, labels)
    if built.recipe.mixing_ratio:
        points += _synthetic(built, embeddings, own, labels)
    if remembered is not None:
        points += _remembered(remembered, chosen, per_class)
    vectors = exact.unit_rows(np.concatenate([part.vectors for part in points]))
    return TrainingMap(
        places=projection.project(vectors),
        kind=np.concatenate([np.full(len(x.label), KINDS.index(x.kind)) for x in points]),
        label=np.concatenate([part.label for part in points]),
        second=np.concatenate([part.second for part in points]),
        age=np.concatenate([part.age for part in points]),
        classes=[train.class_names[c] for c in chosen],
        pictures=[Thumbnail(train, int(i)) for i in images],
    )


def _restore(
    built: Experiment, folder: Path
) -> tuple[Any, np.ndarray, memvir.Memory | None] | None:
    """The network's variables, the proxies and the memory of the last checkpoint."""
    everything = builder.abstract_state(built)
    wanted = {name: getattr(everything, name) for name in ("params", "batch_stats", "memory")}
    try:
        found = everything._replace(**checkpoint.read(folder, "last", wanted)[1])
    except FileNotFoundError:
        return None
    proxies, memory = jax.device_get((found.params["proxies"], found.memory))
    return network_variables(found), proxies, memory


class _Entries(NamedTuple):
    """Remembered steps, the latest first: `[steps, rows, dim]`, `[steps, classes, dim]`."""

    embeddings: Float32[np.ndarray, "steps rows dim"]
    proxies: Float32[np.ndarray, "steps classes pdim"]
    labels: Int64[np.ndarray, "steps rows"]


def _entries(memory: memvir.Memory) -> _Entries:
    """The ring in the order of age: see `memvir` for where a step is."""
    _, blocks, slots = memory.ring.labels.shape
    done = int(memory.steps)
    # The latest step is not in the ring yet, which still has there what it will replace.
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


def _choose(labels: np.ndarray, remembered: _Entries | None) -> Int64[np.ndarray, " classes"]:
    """Classes to show: those that are remembered most, or, without a memory, any."""
    classes = np.random.default_rng(0).permutation(int(labels.max()) + 1)
    if remembered is not None:
        counts = np.bincount(remembered.labels.ravel(), minlength=len(classes))
        classes = classes[np.argsort(-counts[classes], kind="stable")]
    return np.sort(classes[:_CLASSES])


def _some(source: data.Source, indices: np.ndarray) -> data.Source:
    return data.Source(
        records=[source.records[int(i)] for i in indices],
        labels=source.labels[indices],
        class_names=source.class_names,
        names=tuple(source.names[i] for i in indices),
    )


def _points(kind: str, vectors: Any, label: Any, second: Any = -1, age: Any = 0) -> _Points:
    label = np.asarray(label, np.int64)
    second, age = (np.broadcast_to(np.int64(x), label.shape) for x in (second, age))
    return _Points(kind, np.asarray(vectors, np.float32), label, second, age)


def _actual(
    built: Experiment,
    embeddings: Float[Array, "n d"],
    proxies: Float[Array, "p d2"],
    labels: Int64[np.ndarray, " n"],
) -> list[_Points]:
    rows, columns = built.recipe.loss.prepare(embeddings, proxies)
    per_class = built.recipe.loss.proxies_per_class
    classes = np.arange(len(columns)) // per_class
    return [_points("image", rows, labels), _points("proxy", columns, classes)]


def _synthetic(
    built: Experiment,
    embeddings: Float[Array, "n d"],
    proxies: Float[Array, "p d2"],
    labels: Int64[np.ndarray, " n"],
) -> list[_Points]:
    """Mixtures as training steps make them, with the shown images for their batch.

    A step mixes all its pairs by one weight. So that several weights are seen, each of some steps
    gives a part of the points.
    """
    recipe, batch = built.recipe, len(labels)
    per_class = recipe.loss.proxies_per_class
    points = []
    for part in range(_STEPS):
        lam, partner = proxy_synthesis.draw(
            jax.random.key(part),
            jnp.asarray(labels),
            alpha=recipe.mixing_alpha,
            ratio=recipe.mixing_ratio,
        )
        problem = proxy_synthesis.synthesize(
            embeddings,
            proxies,
            jnp.asarray(labels),
            lam=lam,
            partner=partner,
            ratio=recipe.mixing_ratio,
            loss=recipe.loss,
        )
        kept = np.flatnonzero(problem.row_mask[batch:])
        kept = kept[kept % _STEPS == part]
        first, second = labels[kept % batch], labels[np.asarray(partner).ravel()[kept]]
        # Of a class with several proxies, the first mixture.
        mixed = np.asarray(problem.proxies)[len(proxies) :: per_class]
        rows = np.asarray(problem.embeddings)[batch:]
        points.append(_points("synthetic embedding", rows[kept], first, second))
        points.append(_points("synthetic proxy", mixed[kept], first, second))
    return points


def _remembered(
    entries: _Entries, chosen: Int64[np.ndarray, " classes"], per_class: int
) -> list[_Points]:
    """All remembered embeddings of the classes, and their proxies at evenly spaced ages."""
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
