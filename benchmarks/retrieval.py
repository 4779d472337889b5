"""Times evaluations against faiss's search alone, and against a loop over the queries.

python -m benchmarks.retrieval
python -m benchmarks.retrieval --size=sop --depth=1000 --json=sop.json

Embeddings are synthetic, with as many images and classes as the test sets of three data sets, and
classes of equal size. All metrics but NMI are computed. "search" is faiss's exact search alone, for
as many neighbours as the deepest metric needs. "loop" adds R-precision and MAP@R query by query, as
in the official programs. The others are `retrieval.evaluate` with its backends. The implementations
take turns in one process, after a first call with a few queries, and their scores are compared. On
a machine with other load, compare CPU time rather than wall-clock time.
"""

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import faiss
import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from dml_jax import retrieval
from dml_jax.cli import command_line
from dml_jax.retrieval import exact


class Size(NamedTuple):
    """The size of a test set."""

    queries: int
    classes: int
    gallery: int = 0
    """Number of gallery images; 0 if the queries are their own gallery."""


SIZES = {
    "cars196": Size(8_131, 98),
    "inshop": Size(14_218, 3_985, 12_612),
    "sop": Size(60_502, 11_316),
}

_SIZES = flags.DEFINE_multi_enum("size", list(SIZES), SIZES, "Data sets whose sizes to use.")
_FORMS = flags.DEFINE_multi_enum(
    "form",
    ["loop", "cpu", "jax"],
    ["loop", "cpu", "jax"],
    "Implementations to time besides the search.",
)
_DEPTH = flags.DEFINE_integer("depth", 8, "Largest k of Recall@k.", lower_bound=8)
_DIM = flags.DEFINE_integer("dim", 512, "Dimension of the embeddings.", lower_bound=1)
_QUERIES = flags.DEFINE_integer(
    "queries", None, "Maximum number of queries; the gallery is complete."
)
_TURNS = flags.DEFINE_integer("turns", 3, "Number of turns of each.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "JSON file for all times.")

_FEW = 512  # Number of queries of the first, untimed call.
_PRECISIONS = ("r_precision", "map@r")


class Problem(NamedTuple):
    """Unit embeddings of queries and gallery, their classes, and the values of k."""

    queries: np.ndarray
    labels: np.ndarray
    gallery: np.ndarray
    gallery_labels: np.ndarray
    recall_at: tuple[int, ...]

    @property
    def alone(self) -> bool:
        """Whether the queries are their own gallery."""
        return self.queries is self.gallery

    @property
    def relevant(self) -> np.ndarray:
        """R of each query."""
        return np.bincount(self.gallery_labels)[self.labels] - self.alone

    @property
    def depth(self) -> int:
        """The number of neighbours that the deepest metric needs."""
        return max(*self.recall_at, *self.relevant.tolist())

    def first(self, count: int) -> "Problem":
        """Returns the problem with the first queries only, in the same gallery."""
        return self._replace(queries=self.queries[:count], labels=self.labels[:count])


class Seconds(NamedTuple):
    """The seconds of each turn."""

    clock: list[float]
    cores: list[float]
    """CPU time of all cores."""


def main() -> None:
    """Runs the program."""
    results = {}
    for name in _SIZES.value:
        problem = _problem(SIZES[name])
        if _QUERIES.value:
            problem = problem.first(_QUERIES.value)
        seconds = _take_turns(problem)
        Console().print(_table(name, problem, seconds))
        results[name] = {form: turns._asdict() for form, turns in seconds.items()}
    if _JSON.value:
        about = {
            "python": platform.python_version(),
            "versions": {module.__name__: module.__version__ for module in (jax, np, faiss)},
            "cores": len(os.sched_getaffinity(0)),
            "devices": [device.device_kind for device in jax.devices()],
            **{flag.name: flag.value for flag in (_DEPTH, _DIM, _QUERIES)},
        }
        Path(_JSON.value).write_text(json.dumps(about | {"seconds": results}, indent=2))


def _problem(size: Size) -> Problem:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((size.classes, _DIM.value), np.float32)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.resize(np.arange(size.classes), count))
        noise = rng.standard_normal((count, _DIM.value), np.float32)
        return exact.unit_rows(centres[labels] + 3 * noise), labels

    queries, labels = draw(size.queries)
    gallery, gallery_labels = draw(size.gallery) if size.gallery else (queries, labels)
    recall_at = tuple(sorted({1, 2, 4, 8, _DEPTH.value}))
    return Problem(queries, labels, gallery, gallery_labels, recall_at)


def _take_turns(problem: Problem) -> dict[str, Seconds]:
    """Returns the times of each implementation.

    Raises:
        ValueError: two implementations score differently.
    """
    seconds = {name: Seconds([], []) for name in ("search", *_FORMS.value)}
    for name in seconds:
        FORMS[name](problem.first(_FEW))
    scores: dict[str, float] = {}
    for name in [*seconds] * _TURNS.value:
        began, computed = time.perf_counter(), time.process_time()
        found = FORMS[name](problem)
        seconds[name].clock.append(time.perf_counter() - began)
        seconds[name].cores.append(time.process_time() - computed)
        scores = scores or found
        for metric, value in found.items():
            # Neighbours may differ between equal similarities in float32.
            if abs(value - scores[metric]) > 1e-4:
                raise ValueError(
                    f"{name}: {metric} is {value}, but another implementation has {scores[metric]}"
                )
    return seconds


def _neighbours(problem: Problem) -> np.ndarray:
    index = faiss.IndexFlatIP(problem.gallery.shape[1])
    index.add(problem.gallery)
    return index.search(problem.queries, problem.depth + problem.alone)[1]


def _search(problem: Problem) -> dict[str, float]:
    _neighbours(problem)
    return {}


def _loop(problem: Problem) -> dict[str, float]:
    neighbours, relevant = _neighbours(problem), problem.relevant
    scores = {name: 0.0 for name in (*map("recall@{}".format, problem.recall_at), *_PRECISIONS)}
    for query, found in enumerate(neighbours):
        if problem.alone:
            found = found[found != query]
        right = problem.gallery_labels[found] == problem.labels[query]
        for k in problem.recall_at:
            scores[f"recall@{k}"] += right[:k].any()
        right = right[: relevant[query]]
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        scores["r_precision"] += right.mean()
        scores["map@r"] += (precision * right).mean()
    return {name: float(total / len(neighbours)) for name, total in scores.items()}


def _evaluate(problem: Problem, backend: str) -> dict[str, float]:
    gallery = None if problem.alone else (problem.gallery, problem.gallery_labels)
    scores = retrieval.evaluate(
        problem.queries,
        problem.labels,
        recall_at=problem.recall_at,
        gallery=gallery,
        backend=backend,
    )
    scores.pop("queries_without_match")
    return scores


FORMS: dict[str, Callable[[Problem], dict[str, float]]] = {
    "search": _search,
    "loop": _loop,
    "cpu": functools.partial(_evaluate, backend="cpu"),
    "jax": functools.partial(_evaluate, backend="jax"),
}


def _table(name: str, problem: Problem, seconds: Mapping[str, Seconds]) -> Table:
    title = f"{name}: {len(problem.queries):,} queries in {len(problem.gallery):,}"
    table = Table(
        *("", "seconds, median (range)", "CPU time", "relative to search", "CPU time"),
        title=f"{title}, k = {problem.depth}",
    )
    search_clock, search_cores = map(statistics.median, seconds["search"])
    for form, (clock, cores) in seconds.items():
        table.add_row(
            form,
            _median(clock),
            _median(cores),
            f"{statistics.median(clock) / search_clock:.2f}",
            f"{statistics.median(cores) / search_cores:.2f}",
        )
    return table


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    command_line.run(main)
