"""Writes the report: one self-contained HTML file."""

import base64
import json
import shlex
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int64

import dml_jax
from dml_jax import data, losses, retrieval
from dml_jax._utils import extras, files
from dml_jax._utils.errors import UserError
from dml_jax.data import splits
from dml_jax.inference import trained
from dml_jax.report import boundaries, projection, ranking, tables, thumbnails, training_map
from dml_jax.report.runs import Group, Run
from dml_jax.retrieval import exact
from dml_jax.training import run_directory
from dml_jax.training.config import parse

with extras.required_by("report"):
    import jinja2
    import plotly.offline
    from markupsafe import Markup

MOST_IMAGES = 12_000
"""Maximum number of images on a page; of a larger test set, a subset of queries is shown."""

_CONFUSED_PAIRS = 30
_SCRIPTS = ("data.js", "charts.js", "map.js", "training.js", "gallery.js", "classes.js", "main.js")


def write(
    groups: Sequence[Group],
    path: Path,
    *,
    checkpoint: str = "last",
    log: Callable[[str], None] = print,
) -> None:
    """Writes the report of runs that were tested on the same images.

    Args:
        groups: groups of runs, see `runs.group`.
        path: the HTML file to write.
        checkpoint: name of the checkpoints that the map of training classes and the confidence
            between classes are computed from; all else is of the last epoch.
        log: called with progress messages.

    Raises:
        FileNotFoundError: the folder of `path`, or the images, do not exist.
        ValueError: the images differ from those the runs were tested on.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: its folder does not exist; create it first")
    first = groups[0].first
    sources = _sources(first)
    log("searching neighbours")
    rankings = [ranking.rank(group.first.queries, group.first.gallery) for group in groups]
    queries, shown = _choose(first, rankings)
    log(f"computing {len(groups)} maps of {len(shown)} images")
    maps = _maps(groups, shown)
    log("computing the maps of training classes")
    of_training = [_training_classes(group.first, checkpoint) for group in groups]
    training_maps = [(group.name, x[0]) for group, x in zip(groups, of_training, strict=True)]
    confidences = [None if x is None else np.round(x, 5).tolist() for _, x in of_training]
    present = [(name, one) for name, one in training_maps if one is not None]
    log("encoding thumbnails")
    images = _thumbnails(sources, shown) + [x for _, one in present for x in one.thumbnails]
    sheets = thumbnails.draw(images, first.config)
    content = {
        "images": _images(first, shown) | {"side": sheets.side, "columns": thumbnails.COLUMNS},
        "queries": _pack(queries),
        "runs": [
            _run(group, one, queries, shown, positions)
            for group, one, positions in zip(groups, rankings, maps, strict=True)
        ],
        "curves": [_curve(i, run) for i, group in enumerate(groups) for run in group.runs],
        "scores": list(retrieval.SCORES.items()),
        "training": _training(present, len(shown)),
        "kinds": training_map.KINDS,
        "positions": np.round(boundaries.POSITIONS, 5).tolist(),
        "confidences": confidences,
    }
    text = _template().render(
        groups=groups,
        first=first,
        test_images=len(first.queries.labels),
        test_classes=len(np.unique(first.queries.labels)),
        shown=len(shown),
        all_shown=len(shown) == _count(first),
        without=[name for name, one in training_maps if one is None],
        score_names=list(retrieval.SCORES),
        comparison=tables.scores(groups),
        zero_shot=tables.zero_shot(groups),
        published=any(run.published for group in groups for run in group.runs),
        costs=tables.costs(groups),
        settings=tables.settings(groups),
        commands=tables.commands(groups),
        command=_command(groups, path, checkpoint),
        checkpoint=checkpoint,
        has_training=bool(present),
        without_confidence=[
            group.name for group, x in zip(groups, confidences, strict=True) if x is None
        ],
        version=dml_jax.__version__,
        date=time.strftime("%Y-%m-%d"),
        content=_json(content),
        sheets=sheets.files,
        style=_file("style.css"),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        scripts=[_file(name) for name in _SCRIPTS],
    )
    files.write_text(path, text)


def _training_classes(
    run: Run, name: str
) -> tuple[training_map.TrainingMap | None, np.ndarray | None]:
    """Returns the map of training classes and the confidence between them, if there are any."""
    if isinstance(parse(run.config).loss, losses.PairLoss):
        return None, None
    built = trained.build(run.folder)
    try:
        state = trained.read_training_state(built, run.folder, name, with_memory=True)
    except FileNotFoundError as error:
        logging.warning("no map and no decision boundaries of %s: %s", run.place, error)
        return None, None
    return training_map.compute(built, state), boundaries.compute(built, state)


def _command(groups: Sequence[Group], path: Path, checkpoint: str) -> str:
    folders = [run.place for group in groups for run in group.runs]
    words = ["python scripts/report.py", *map(shlex.quote, folders), shlex.quote(f"--out={path}")]
    words += [f"--checkpoint={checkpoint}"] if checkpoint != "last" else []
    return " \\\n    ".join(words)


def _sources(run: Run) -> dict[str, data.Source]:
    """Returns the images that a run was tested on, after checking that they are the same."""
    config = run.config
    sources, _ = splits.load_splits(
        parse(config).data, config.evaluation.recall_at, run_directory.read_inspection(run.folder)
    )
    for split, embedded in (("test", run.queries), ("gallery", run.gallery)):
        if embedded is not None and sources[split].names != embedded.names:
            raise UserError(
                f"the {split} images in {config.data.root or config.data.name} differ from those "
                f"{run.place} was tested on; restore them, or train again"
            )
    return sources


def _count(run: Run) -> int:
    return len(run.queries.labels) + (0 if run.gallery is None else len(run.gallery.labels))


def _choose(
    run: Run, rankings: Sequence[ranking.Ranking]
) -> tuple[Int64[np.ndarray, " q"], Int64[np.ndarray, " n"]]:
    """Returns the indices of the queries and of the images to show.

    Gallery images are numbered after the queries. All neighbours of a shown query are shown.
    """
    offset = 0 if run.gallery is None else len(run.queries.labels)
    if _count(run) <= MOST_IMAGES:
        return np.arange(len(run.queries.labels)), np.arange(_count(run))
    order = np.random.default_rng(0).permutation(len(run.queries.labels))
    near = np.concatenate([one.neighbours[order] for one in rankings], axis=1) + offset
    needed = np.concatenate([order[:, None], near], axis=1)
    _, first_index = np.unique(needed, return_index=True)
    new = np.bincount(first_index // needed.shape[1], minlength=len(order))
    fit = int(np.searchsorted(np.cumsum(new), MOST_IMAGES, side="right"))
    return np.sort(order[:fit]), np.unique(needed[:fit])


def _vectors(run: Run, shown: Int64[np.ndarray, " n"]) -> np.ndarray:
    parts = [part.embeddings for part in (run.queries, run.gallery) if part is not None]
    return exact.unit_rows(np.concatenate(parts)[shown])


def _maps(groups: Sequence[Group], shown: Int64[np.ndarray, " n"]) -> list[np.ndarray]:
    positions: list[np.ndarray] = []
    for group in groups:
        start = positions[0] if positions else None
        positions.append(projection.project(_vectors(group.first, shown), start=start))
    return positions


def _thumbnails(
    sources: dict[str, data.Source], shown: Int64[np.ndarray, " n"]
) -> list[thumbnails.Thumbnail]:
    tests = len(sources["test"])
    return [
        thumbnails.Thumbnail(sources["test"], int(i))
        if i < tests
        else thumbnails.Thumbnail(sources["gallery"], int(i) - tests)
        for i in shown
    ]


def _images(run: Run, shown: Int64[np.ndarray, " n"]) -> dict[str, Any]:
    parts = [part for part in (run.queries, run.gallery) if part is not None]
    names = [name for part in parts for name in part.names]
    labels = np.concatenate([part.labels for part in parts])
    return {
        "names": [names[i] for i in shown],
        "labels": _pack(labels[shown]),
        "classes": run.queries.class_names,
    }


def _run(
    group: Group,
    ranked: ranking.Ranking,
    queries: Int64[np.ndarray, " q"],
    shown: Int64[np.ndarray, " n"],
    positions: np.ndarray,
) -> dict[str, Any]:
    """Returns the data of a run for the scripts; indices refer to the images shown."""
    run = group.first
    offset = 0 if run.gallery is None else len(run.queries.labels)
    near = np.searchsorted(shown, ranked.neighbours[queries] + offset)
    classes = ranking.by_class(run, ranked)
    same, other = ranking.similarity_histogram(run)
    return {
        "name": group.name,
        "neighbours": _pack(near.ravel()),
        "perQuery": near.shape[1],
        "similarities": _pack(np.round((ranked.similarities[queries].ravel() + 1) * 10_000)),
        "precision": _pack(np.round(ranked.average_precision[queries] * 10_000)),
        "answerable": _pack(ranked.relevant[queries] > 0),
        "positions": _pack(np.round(positions.ravel() * 65_535)),
        "classes": {
            "queries": classes.queries.tolist(),
            "recall": np.round(classes.recall, 5).tolist(),
            "precision": np.round(classes.precision, 5).tolist(),
        },
        "confused": ranking.confused_pairs(run, ranked, _CONFUSED_PAIRS),
        "histogram": {"same": same.tolist(), "other": other.tolist()},
    }


def _curve(group: int, run: Run) -> dict[str, Any]:
    """Returns a run's metrics by epoch and by seconds of training and evaluation."""
    ends = np.cumsum([x["train_seconds"] + x["evaluation_seconds"] for x in run.timings])
    steps = [line["step"] for line in run.timings]
    seconds = dict(zip(steps, np.round(ends, 2).tolist(), strict=True))
    return {
        "group": group,
        "seed": run.config.seed,
        "lines": {
            metric: [
                [line["epoch"], seconds.get(line["step"]), round(line[metric], 5)]
                for line in run.metrics
                if metric in line
            ]
            for metric in ("loss", "memvir_classes", *retrieval.SCORES.values())
        },
    }


def _training(
    maps: Sequence[tuple[str, training_map.TrainingMap]], first_thumbnail: int
) -> list[dict[str, Any]]:
    result = []
    for name, one in maps:
        result.append(
            {
                "name": name,
                "positions": _pack(np.round(one.positions.ravel() * 65_535)),
                "kind": one.kind.tolist(),
                "label": one.label.tolist(),
                "second": one.second.tolist(),
                "age": one.age.tolist(),
                "classes": one.classes,
                "firstThumbnail": first_thumbnail,
                "names": [x.source.names[x.number] for x in one.thumbnails],
            }
        )
        first_thumbnail += len(one.thumbnails)
    return result


def _pack(numbers: np.ndarray) -> str:
    """Returns integers in 0..65535 as base64 of little-endian uint16."""
    return base64.b64encode(np.asarray(numbers).astype("<u2").tobytes()).decode()


def _json(content: Any) -> Markup:
    """Returns JSON that is safe inside a script element, whatever the class names contain."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _file(name: str) -> Markup:
    return Markup((resources.files("dml_jax.report") / "assets" / name).read_text(encoding="utf-8"))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dml_jax.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html")
