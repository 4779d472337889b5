"""Computes the retrieval metrics of a run's checkpoint, of exported embeddings or of a backbone.

dml-jax evaluate --workdir=runs/memvir --checkpoint=best_map
dml-jax evaluate --embeddings=runs/memvir/embeddings.npz --nmi --recall_at=1,10,100
dml-jax evaluate --config=cars196 --backbone=resnet50 --pretrained=hf:timm/resnet50.tv_in1k
dml-jax evaluate --config=folder --config.data.root=photos --zero-shot --out=leaderboard

The last two forms train nothing: they score the pooled features of a backbone on the test images of
the config, and the same features after PCA-whitening fitted on its training images. The last one
does so for a list of backbones and writes a page that compares them. Started again, it resumes.
--deform=cutout,rotation also scores a run on deformed test images, for each of a few strengths.
--rerank also scores the neighbours after re-ranking, and prints the seconds of the search with and
without it.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dml_jax import retrieval
from dml_jax._utils import files, sharding, storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import checkpoint_flag, command_line, config_flag
from dml_jax.data.deformations import DEFORMATIONS
from dml_jax.evaluation import embedding_files, robustness
from dml_jax.inference import leaderboard
from dml_jax.models import pretrained, zoo
from dml_jax.retrieval import reranking
from dml_jax.training import bucket, builder, checkpoint, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of a run.")
_CHECKPOINT = checkpoint_flag.define("The checkpoint of the run")
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Exported embeddings, instead of a run.")
_GALLERY = flags.DEFINE_string(
    "gallery", None, "Exported embeddings of the gallery; default: --embeddings itself."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Config whose images are embedded by a backbone that was not trained."
)
_BACKBONE = flags.DEFINE_string("backbone", None, "The backbone; default: as in the config.")
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "Weights of the backbone; default: as in the config."
)
_RECALL_AT = flags.DEFINE_list(
    "recall_at", None, "Values of k for Recall@k; default: the run's, or 1,2,4,8."
)
_NMI = flags.DEFINE_bool("nmi", None, "Whether to compute NMI; default: as in the run.")
_AMI = flags.DEFINE_bool("ami", False, "Whether to compute AMI, by scikit-learn.")
_PRECISION_AT = flags.DEFINE_list("precision_at", [], "Values of k for precision@k.")
_MAP_AT = flags.DEFINE_list("map_at", [], "Values of k for MAP@k, normalised by min(k, R).")
_PER_CLASS = flags.DEFINE_bool(
    "per_class", False, "Whether to compute means that count each class once, too."
)
_CONFIDENCE = flags.DEFINE_float(
    "confidence", None, "Level of bootstrap intervals over classes, such as 0.95; default: none."
)
_FMR = flags.DEFINE_list(
    "fmr", [], "False match rates, such as 1e-3, for the threshold that each needs and its FNMR."
)
_DIAGNOSTICS = flags.DEFINE_bool(
    "diagnostics", False, "Whether to compute alignment, uniformity, density and spectral decay."
)
_RERANK = flags.DEFINE_enum(
    "rerank", None, reranking.METHODS, "How to re-rank the neighbours, for a second set of scores."
)
_DEFORM = flags.DEFINE_list(
    "deform",
    [],
    f"Deformations of a run's test images, for further scores: {', '.join(DEFORMATIONS)}.",
)
_ZERO_SHOT = flags.DEFINE_bool(
    "zero_shot", False, "Whether to score all of --backbones and write a page, --out/index.html."
)
flags.DEFINE_alias("zero-shot", "zero_shot")
_BACKBONES = flags.DEFINE_list(
    "backbones",
    [f"{name}={location}" for name, location in zoo.WEIGHTS],
    "The backbones of --zero_shot and their weights: resnet50=hf:timm/resnet50.tv_in1k,...",
)
_OUT = flags.DEFINE_string("out", "leaderboard", "The folder that --zero_shot writes.")

# Not together with --zero_shot.
_OF_OTHERS = (
    *(_CHECKPOINT, _GALLERY, _BACKBONE, _PRETRAINED),
    *(_AMI, _PRECISION_AT, _MAP_AT, _PER_CLASS, _CONFIDENCE, _FMR, _RERANK, _DIAGNOSTICS, _DEFORM),
)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        options = _options()
        scores: dict[str, Any]
        unknown = [name for name in _DEFORM.value if name not in DEFORMATIONS]
        if unknown:
            raise UserError(
                f"--deform: no {', '.join(unknown)}; choose from {', '.join(DEFORMATIONS)}"
            )
        one = sum(_given(option) for option in (_WORKDIR, _EMBEDDINGS, _CONFIG)) == 1
        if one and _EMBEDDINGS.value and not _given(_CHECKPOINT, _BACKBONE, _PRETRAINED, _DEFORM):
            scores = _score_exported(_EMBEDDINGS.value, options)
        elif one and _WORKDIR.value and not _given(_GALLERY, _BACKBONE, _PRETRAINED):
            scores = _score_run(bucket.copy(_WORKDIR.value), options)
        elif one and _ZERO_SHOT.value and _CONFIG.value and not _given(*_OF_OTHERS):
            _write_leaderboard(_CONFIG.value, options, Path(_OUT.value))
            return
        elif one and _CONFIG.value and not _given(_CHECKPOINT, _GALLERY, _ZERO_SHOT, _DEFORM):
            scores = _score_backbone(_CONFIG.value, options)
        else:
            raise UserError(
                "give one of --workdir, optionally with --checkpoint and --deform; --embeddings, "
                "optionally with --gallery; and --config, optionally with --backbone and "
                "--pretrained, or with --zero_shot"
            )
    print(json.dumps(scores, indent=2))


def _options() -> dict[str, Any]:
    """Returns the arguments of `retrieval.evaluate` that flags give."""
    given = {
        "recall_at": command_line.numbers(_RECALL_AT, int) if _RECALL_AT.value else None,
        "nmi": _NMI.value,
    }
    return {name: value for name, value in given.items() if value is not None} | {
        "ami": _AMI.value,
        "precision_at": command_line.numbers(_PRECISION_AT, int),
        "map_at": command_line.numbers(_MAP_AT, int),
        "per_class": _PER_CLASS.value,
        "confidence": _CONFIDENCE.value,
        "fmr": command_line.numbers(_FMR, float),
        "diagnostics": _DIAGNOSTICS.value,
    }


def _scored(score: Callable[..., dict[str, float]], options: dict[str, Any]) -> dict[str, Any]:
    """Returns scores and, if asked for, those after re-ranking with the time of both searches."""
    scores: dict[str, Any] = score(**options)
    if _RERANK.value is None:
        return scores
    order = options | {"nmi": False, "ami": False, "fmr": (), "diagnostics": False}
    _, seconds_without = _timed(score, **order)
    reranked, seconds = _timed(score, **order, rerank=_RERANK.value)
    scores["reranked"] = {
        "method": _RERANK.value,
        **reranked,
        "seconds": seconds,
        "seconds_without": seconds_without,
    }
    return scores


def _timed(
    score: Callable[..., dict[str, float]], **options: Any
) -> tuple[dict[str, float], float]:
    start = time.perf_counter()
    scores = score(**options)
    return scores, round(time.perf_counter() - start, 3)


def _given(*options: flags.FlagHolder) -> bool:
    return any(option.value for option in options)


def _score_exported(file: str, options: dict[str, Any]) -> dict[str, Any]:
    queries = embedding_files.load_embeddings(file)
    gallery = None
    if _GALLERY.value:
        exported = embedding_files.load_embeddings(_GALLERY.value)
        if exported.class_names != queries.class_names:
            raise UserError(
                f"{_GALLERY.value} and {file} have different class names; "
                "export both from one data set"
            )
        gallery = exported.embeddings, exported.labels
    return _scored(
        lambda **chosen: retrieval.evaluate(
            queries.embeddings, queries.labels, gallery=gallery, **chosen
        ),
        options,
    )


def _score_backbone(config: ConfigDict, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    config.model.backbone = _BACKBONE.value or config.model.backbone
    config.model.pretrained = _PRETRAINED.value or config.model.pretrained
    built = builder.build(parse(leaderboard.without_training(config)), sharding.make_mesh())
    embedded = leaderboard.embed(built, network_variables(built.init()))
    return {
        kind: _scored(functools.partial(built.evaluator.score, vectors), options)
        for kind, vectors in embedded.items()
    }


def _write_leaderboard(config: ConfigDict, options: dict[str, Any], folder: Path) -> None:
    # The page needs packages of an extra; without them nothing should be computed.
    from dml_jax.report import leaderboard as page

    if storage.is_url(_OUT.value):
        raise UserError(f"--out={_OUT.value} must be a local folder")
    entries = [_entry(one) for one in _BACKBONES.value]
    chosen = {name: options[name] for name in ("recall_at", "nmi") if name in options}
    config.evaluation.update(chosen)
    scored = leaderboard.score(
        config, entries, frozenset(config_flag.overrides()), folder / "results"
    )
    files.write_json(folder / "leaderboard.json", scored._asdict())
    page.write(scored, folder / "index.html", device=jax.devices()[0].device_kind)
    print(f"Leaderboard of {len(scored.rows)} backbones: {(folder / 'index.html').absolute()}")
    if scored.failed:
        raise UserError(
            f"{len(scored.failed)} of {len(entries)} backbones could not be scored; the page has "
            "the errors, and the same command tries these again"
        )


def _entry(given: str) -> leaderboard.Entry:
    name, equals, location = given.partition("=")
    if not equals or not pretrained.is_location(location):
        raise UserError(
            f"--backbones: {given!r} must be BACKBONE=WEIGHTS, such as "
            "resnet50=hf:timm/resnet50.tv_in1k or resnet50=FILE.safetensors"
        )
    return leaderboard.Entry(name, location)


def _score_run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    config = parse(run_directory.read_config(folder))
    built = builder.build(config, sharding.make_mesh(), run_directory.read_inspection(folder))
    _, variables = checkpoint.read_network(built.network, folder, _CHECKPOINT.value or "last")
    embeddings = built.evaluator.embed(variables, "test")
    scores = _scored(functools.partial(built.evaluator.score, embeddings), options)
    if _DEFORM.value:
        scores["deformed"] = robustness.score(
            built.evaluator, variables, embeddings, _DEFORM.value, **options
        )
    return scores


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
