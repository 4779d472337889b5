"""The result of a run: scores before the first step and after the last, and embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import PyTree

from dml_jax._utils import processes
from dml_jax._utils.files import read_json, write_json
from dml_jax.evaluation import embedding_files, zero_shot
from dml_jax.models import pretrained
from dml_jax.training import checkpoint, run_directory
from dml_jax.training.bucket import Bucket
from dml_jax.training.builder import Experiment
from dml_jax.training.fork import forked_from
from dml_jax.training.trackers import projector


def score_backbone(experiment: Experiment, workdir: Path, variables: dict[str, PyTree]) -> None:
    """Scores the features of the backbone on the test images, and writes `zero_shot.json`.

    A backbone with random weights that is no fork of another run is not scored, and none if the
    run does not score the test images.

    Args:
        experiment: experiment of the run.
        workdir: directory of the run.
        variables: variables of the network before the first step.
    """
    config = experiment.config
    is_fork = forked_from(workdir, None) is not None
    is_random = config.model.pretrained == pretrained.NONE and not is_fork
    if is_random or not config.evaluation.test:
        return
    evaluator = experiment.evaluator
    if config.model.prompts and not is_fork:
        # They are random yet.
        network = evaluator.network
        model = dataclasses.replace(network.model, prompts=0)
        evaluator = evaluator._replace(network=network._replace(model=model))
    scores = evaluator.score(zero_shot.pooled_features(evaluator, variables, "test"))
    if processes.is_first_process():
        write_json(workdir / run_directory.ZERO_SHOT, scores)


def write(
    experiment: Experiment,
    workdir: Path,
    evaluated: Sequence[Mapping[str, Any]],
    embeddings: Mapping[str, np.ndarray] | None,
    published: Bucket | None = None,
) -> dict[str, Any]:
    """Exports the last embeddings of the test images, and writes and returns `result.json`.

    Args:
        experiment: experiment of the run.
        workdir: directory of the run.
        evaluated: metrics of the evaluated epochs.
        embeddings: embeddings of the test images after the last epoch; see `Evaluator.embed`. None
            if the test images are not scored.
        published: where the run is published.
    """
    last: Mapping[str, Any] = evaluated[-1]
    best: dict[str, Mapping[str, Any]] = {
        metric: max(evaluated, key=lambda line: (line[metric], line["step"]))
        for metric in checkpoint.BEST.values()
    }
    if embeddings is not None and experiment.selection_split != "test":
        last = _position(last) | experiment.evaluator.score(embeddings)
        best = _best_on_test(experiment, workdir, evaluated, published)
    result = {
        "last": last,
        "best": best["map@r"],
        "best_of": best,
        "best_chosen_on": experiment.selection_split,
        "scored_on": experiment.selection_split if embeddings is None else "test",
        "skipped_steps": evaluated[-1]["skipped_steps"],
        "images": {split: len(source) for split, source in experiment.sources.items()},
        "classes": {split: len(source.class_names) for split, source in experiment.sources.items()},
        **experiment.inspection.counts(),
    }
    untrained = read_json(workdir / run_directory.ZERO_SHOT)
    if untrained is not None:
        result["zero_shot"] = untrained
        _compare(last, untrained)
    if processes.is_first_process() and embeddings is not None:
        _export(experiment, workdir, embeddings)
    if processes.is_first_process():
        write_json(workdir / run_directory.RESULT, result)
    processes.wait_for_all("result written")
    return result


def _compare(trained: Mapping[str, Any], untrained: Mapping[str, float]) -> None:
    """Warns if the trained embedding is worse than the features of the backbone alone."""
    ours, theirs = (100 * scores["map@r"] for scores in (trained, untrained))
    if ours < theirs:
        logging.warning(
            "the trained embedding has a MAP@R of %.2f, less than the %.2f of the pooled features "
            "of the backbone that it started from; see config.optimizer.learning_rate and "
            "config.model.train_from",
            ours,
            theirs,
        )


def _best_on_test(
    experiment: Experiment,
    workdir: Path,
    evaluated: Sequence[Mapping[str, Any]],
    published: Bucket | None,
) -> dict[str, Mapping[str, Any]]:
    """Returns the test scores of the best checkpoints, selected on the validation classes."""
    best: dict[str, Mapping[str, Any]] = {}
    with checkpoint.Checkpoints(workdir) as saved:
        # The best intact checkpoints.
        steps = {name: saved.find(name) for name in checkpoint.BEST}
    for name, metric in checkpoint.BEST.items():
        (line,) = (line for line in evaluated if line["step"] == steps[name])
        _, variables = checkpoint.read_network(experiment.network, workdir, name, published)
        evaluator = experiment.evaluator
        best[metric] = _position(line) | evaluator.score(evaluator.embed(variables, "test"))
    return best


def _export(experiment: Experiment, workdir: Path, embeddings: Mapping[str, np.ndarray]) -> None:
    for split, file in (("test", run_directory.EMBEDDINGS), ("gallery", run_directory.GALLERY)):
        if split in embeddings:
            source = experiment.sources[split]
            embedding_files.save_embeddings(
                workdir / file,
                embeddings[split],
                source.labels,
                source.names,
                source.class_names,
            )
    projector.write(workdir, experiment.sources["test"], embeddings["test"])


def _position(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("step", "epoch")}
