"""The final runs of a study: the best settings of each variant, with many seeds on every fold."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from dml_jax import retrieval
from dml_jax._utils.errors import LockedError
from dml_jax.evaluation.embedding_files import Embeddings, load_embeddings
from dml_jax.report import ranking
from dml_jax.retrieval import exact
from dml_jax.study.trials import PAUSE, Variant, of_fold
from dml_jax.training import run_directory


class Final(NamedTuple):
    """The scores of one seed on the test classes, as fractions by metric."""

    seed: int
    folds: Sequence[Mapping[str, float]]
    """Scores of the model of each fold."""
    concatenated: Mapping[str, float]
    """Scores of the embeddings of all models side by side."""
    average_precision: Float64[np.ndarray, " queries"]
    """Average precision at R of each query with a match, of the concatenated embeddings."""
    labels: Int[np.ndarray, " queries"]
    """Classes of these queries."""

    @property
    def separated(self) -> dict[str, float]:
        """Mean scores of the models of the folds."""
        metrics = retrieval.SCORES.values()
        return {name: float(np.mean([fold[name] for fold in self.folds])) for name in metrics}


def train(
    variants: Sequence[tuple[Variant, Mapping[str, Any]]],
    root: Path,
    train_run: Callable[..., dict[str, Any]],
    *,
    folds: int,
    seeds: int,
) -> dict[str, list[Final]]:
    """Trains the final runs, or the missing ones, and returns their scores by variant.

    Several processes may do so at the same time; each takes runs that no other trains.

    Args:
        variants: the variants with their settings, by path.
        root: folder of the study.
        train_run: `run.train`.
        folds: number of folds.
        seeds: number of seeds; they are 0, 1, ...

    Raises:
        Stopped: the process was asked to stop.
    """
    # Seeds are the outer loop, so that an interrupted study covers all variants.
    pending = [
        (of_fold(variant.config, fold, folds, {**settings, "seed": seed}), workdir)
        for seed in range(seeds)
        for variant, settings in variants
        for fold in range(folds)
        for workdir in [_workdir(root, variant.name, seed, fold)]
    ]
    while pending:
        busy = []
        for config, workdir in pending:
            print(f"\n{workdir}")
            try:
                train_run(config, workdir)
            except LockedError:
                busy.append((config, workdir))
        pending = busy
        if pending:
            time.sleep(PAUSE)
    return {
        variant.name: [_score(root, variant.name, seed, folds) for seed in range(seeds)]
        for variant, _ in variants
    }


def _workdir(root: Path, name: str, seed: int, fold: int) -> Path:
    return root / "final" / name / f"seed{seed}" / f"fold{fold}"


def _score(root: Path, name: str, seed: int, folds: int) -> Final:
    workdirs = [_workdir(root, name, seed, fold) for fold in range(folds)]
    results = [run_directory.read_result(workdir) for workdir in workdirs]
    queries = _side_by_side([workdir / run_directory.EMBEDDINGS for workdir in workdirs])
    gallery = None
    if (workdirs[0] / run_directory.GALLERY).exists():
        gallery = _side_by_side([workdir / run_directory.GALLERY for workdir in workdirs])
    ranked = ranking.rank(queries, gallery)
    matched = ranked.relevant > 0
    return Final(
        seed=seed,
        folds=[result["last"] for result in results if result is not None],
        concatenated=retrieval.evaluate(
            queries.embeddings,
            queries.labels,
            recall_at=(1,),
            gallery=None if gallery is None else (gallery.embeddings, gallery.labels),
        ),
        average_precision=ranked.average_precision[matched],
        labels=queries.labels[matched],
    )


def _side_by_side(files: Sequence[Path]) -> Embeddings:
    """Returns the concatenation of the normalised embeddings of several files."""
    loaded = [load_embeddings(file) for file in files]
    vectors = np.concatenate([exact.unit_rows(one.embeddings) for one in loaded], axis=1)
    return loaded[0]._replace(embeddings=vectors)
