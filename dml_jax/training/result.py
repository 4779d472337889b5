"""The result of a finished run: scores of the last and best epochs, and exported embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dml_jax._utils import processes
from dml_jax._utils.files import write_json
from dml_jax.evaluation import embedding_files
from dml_jax.training import checkpoint, run_directory
from dml_jax.training.builder import Experiment
from dml_jax.training.trackers import projector


def write(
    experiment: Experiment,
    workdir: Path,
    evaluated: Sequence[Mapping[str, Any]],
    embeddings: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Exports the last embeddings of the test images, and writes and returns `result.json`.

    Args:
        experiment: experiment of the run.
        workdir: directory of the run.
        evaluated: metrics of the evaluated epochs.
        embeddings: embeddings of the test images after the last epoch; see `Evaluator.embed`.
    """
    last: Mapping[str, Any] = evaluated[-1]
    best: dict[str, Mapping[str, Any]] = {
        metric: max(evaluated, key=lambda line: (line[metric], line["step"]))
        for metric in checkpoint.BEST.values()
    }
    if experiment.selection_split != "test":
        last = _position(last) | experiment.evaluator.score(embeddings)
        best = _best_on_test(experiment, workdir, evaluated)
    result = {
        "last": last,
        "best": best["map@r"],
        "best_of": best,
        "best_chosen_on": experiment.selection_split,
        "skipped_steps": evaluated[-1]["skipped_steps"],
        "images": {split: len(source) for split, source in experiment.sources.items()},
        "classes": {split: len(source.class_names) for split, source in experiment.sources.items()},
        **experiment.inspection.counts(),
    }
    if processes.is_first_process():
        _export(experiment, workdir, embeddings)
        write_json(workdir / run_directory.RESULT, result)
    processes.wait_for_all("result written")
    return result


def _best_on_test(
    experiment: Experiment, workdir: Path, evaluated: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Returns the test scores of the best checkpoints, selected on the validation classes."""
    best: dict[str, Mapping[str, Any]] = {}
    with checkpoint.Checkpoints(workdir) as saved:
        # The best intact checkpoints.
        steps = {name: saved.find(name) for name in checkpoint.BEST}
    for name, metric in checkpoint.BEST.items():
        (line,) = (line for line in evaluated if line["step"] == steps[name])
        _, variables = checkpoint.read_network(experiment.network, workdir, name)
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
