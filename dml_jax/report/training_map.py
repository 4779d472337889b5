"""Maps of training classes with the synthetic and virtual classes that regularisers add.

A map shows embeddings and proxies of a few training classes, the mixtures that Proxy Synthesis
makes of them, and their embeddings and proxies in MemVir's memory, like the figures of the papers.
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
"""The kinds of points on a map."""

_CLASSES = 8
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
    """A map of a few training classes.

    Attributes:
        positions: the position of each point, in 0..1.
        kind: the kind of each point, an index of `KINDS`.
        label: the class of each point, an index of `classes`.
        second: the second class of a synthetic point; -1 for other points.
        age: steps since a point entered the memory; 0 for points outside it.
        classes: names of the classes.
        thumbnails: the images of the points of kind "image", which come first.
    """

    positions: Float64[np.ndarray, "n 2"]
    kind: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]
    second: Int64[np.ndarray, " n"]
    age: Int64[np.ndarray, " n"]
    classes: list[str]
    thumbnails: list[Thumbnail]


def compute(run: Run) -> TrainingMap | None:
    """Returns the map of a run with Proxy Synthesis or MemVir, from its last checkpoint.

    Args:
        run: a finished run.

    Returns:
        The map, or None if the run has neither regulariser or no checkpoint.
    """
    config = run.config
    if not (config.proxy_synthesis.ratio or config.memvir.num_steps):
        return None
    device = sharding.make_mesh(jax.local_devices()[:1])
    built = builder.build(parse(config), device, run_directory.read_inspection(run.folder))
    state = _restore(built, run.folder)
    if state is None:
        return None
    variables, proxies, memory = state
    remembered = None if memory is None else _entries(memory)
    train = built.sources["train"]
    chosen = _choose(train.labels, remembered)
    images = np.concatenate([np.flatnonzero(train.labels == c)[:_IMAGES] for c in chosen])
    source = _subset(train, images)
    embeddings = jnp.asarray(embed_images(built.network, variables, source))
    per_class = built.step_config.loss.proxies_per_class
    own = jnp.asarray(proxies.reshape(len(train.class_names), -1)[chosen])
    own = own.reshape(len(chosen) * per_class, -1)
    labels = np.searchsorted(chosen, source.labels)
    points = _current(built, embeddings, own, labels)
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
        classes=[train.class_names[c] for c in chosen],
        thumbnails=[Thumbnail(train, int(i)) for i in images],
    )


def _restore(
    built: Experiment, folder: Path
) -> tuple[Any, np.ndarray, memvir.Memory | None] | None:
    """Returns network variables, proxies and memory of the last checkpoint, or None without one."""
    everything = built.abstract_state
    wanted = {
        name: getattr(everything, name) for name in ("params", "batch_stats", "average", "memory")
    }
    try:
        found = everything._replace(**checkpoint.read(folder, "last", wanted)[1])
    except FileNotFoundError:
        return None
    proxies, memory = jax.device_get((found.params["proxies"], found.memory))
    return network_variables(found), proxies, memory


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


def _choose(labels: np.ndarray, remembered: _Entries | None) -> Int64[np.ndarray, " classes"]:
    """Returns the classes to show: those with most entries in the memory, or random ones."""
    classes = np.random.default_rng(0).permutation(int(labels.max()) + 1)
    if remembered is not None:
        counts = np.bincount(remembered.labels.ravel(), minlength=len(classes))
        classes = classes[np.argsort(-counts[classes], kind="stable")]
    return np.sort(classes[:_CLASSES])


def _subset(source: data.Source, indices: np.ndarray) -> data.Source:
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


def _current(
    built: Experiment,
    embeddings: Float[Array, "n d"],
    proxies: Float[Array, "p d2"],
    labels: Int64[np.ndarray, " n"],
) -> list[_Points]:
    rows, columns = built.step_config.loss.prepare(embeddings, proxies)
    per_class = built.step_config.loss.proxies_per_class
    classes = np.arange(len(columns)) // per_class
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
    step_config, batch = built.step_config, len(labels)
    per_class = step_config.loss.proxies_per_class
    points = []
    for part in range(_STEPS):
        lam, partner = proxy_synthesis.draw(
            jax.random.key(part),
            jnp.asarray(labels),
            **step_config.mixing.of_draw(),
        )
        problem = proxy_synthesis.synthesize(
            embeddings,
            proxies,
            jnp.asarray(labels),
            lam=lam,
            partner=partner,
            loss=step_config.loss,
            **step_config.mixing.of_synthesis(),
        )
        # For losses with several proxies per class, only the first mixture is shown.
        mixed = np.asarray(problem.proxies)[len(proxies) :: per_class]
        rows = np.asarray(problem.embeddings)[batch:]
        class_mask = problem.class_mask[len(proxies) // per_class :]
        for kind, vectors, mask in (
            ("synthetic embedding", rows, problem.row_mask[batch:]),
            ("synthetic proxy", mixed, class_mask),
        ):
            kept = np.flatnonzero(mask)
            kept = kept[kept % _STEPS == part]
            first, second = labels[kept % batch], labels[np.asarray(partner).ravel()[kept]]
            points.append(_points(kind, vectors[kept], first, second))
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
