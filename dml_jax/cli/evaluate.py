"""Computes the retrieval metrics of a run's checkpoint, of exported embeddings or of a backbone.

dml-jax evaluate --workdir=runs/memvir --checkpoint=best_map
dml-jax evaluate --embeddings=runs/memvir/embeddings.npz --nmi --recall_at=1,10,100
dml-jax evaluate --config=cars196 --backbone=resnet50 --pretrained=hf:timm/resnet50.tv_in1k
dml-jax evaluate --config=folder --config.data.root=photos --zero-shot --out=leaderboard

The last two forms train nothing: they score the pooled features of a backbone on the test images of
the config, and the same features after PCA-whitening fitted on its training images. The last one
does so for a list of backbones and writes a page that compares them. Started again, it resumes.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from dml_jax import retrieval
from dml_jax._utils import files, sharding, storage
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line, config_flag
from dml_jax.evaluation import embedding_files
from dml_jax.inference import leaderboard
from dml_jax.models import pretrained, zoo
from dml_jax.training import bucket, builder, checkpoint, run_directory
from dml_jax.training.config import parse

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of a run.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    None,
    ["last", *checkpoint.BEST],
    "The checkpoint of the run; default: the last one.",
)
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

_OF_OTHERS = (_CHECKPOINT, _GALLERY, _BACKBONE, _PRETRAINED)  # Not together with --zero_shot.


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        recall_at = _recall_at(_RECALL_AT.value) if _RECALL_AT.value else None
        scores: dict[str, Any]
        one = sum(_given(option) for option in (_WORKDIR, _EMBEDDINGS, _CONFIG)) == 1
        if one and _EMBEDDINGS.value and not _given(_CHECKPOINT, _BACKBONE, _PRETRAINED):
            scores = _score_exported(_EMBEDDINGS.value, recall_at or [1, 2, 4, 8])
        elif one and _WORKDIR.value and not _given(_GALLERY, _BACKBONE, _PRETRAINED):
            scores = _score_run(bucket.copy(_WORKDIR.value), recall_at)
        elif one and _ZERO_SHOT.value and _CONFIG.value and not _given(*_OF_OTHERS):
            _write_leaderboard(_CONFIG.value, recall_at, Path(_OUT.value))
            return
        elif one and _CONFIG.value and not _given(_CHECKPOINT, _GALLERY, _ZERO_SHOT):
            scores = _score_backbone(_CONFIG.value, recall_at)
        else:
            raise UserError(
                "give one of --workdir, optionally with --checkpoint; --embeddings, optionally "
                "with --gallery; and --config, optionally with --backbone and --pretrained, or "
                "with --zero_shot"
            )
    print(json.dumps(scores, indent=2))


def _given(*options: flags.FlagHolder) -> bool:
    return any(option.value for option in options)


def _recall_at(given: list[str]) -> list[int]:
    try:
        return [int(k) for k in given]
    except ValueError:
        raise UserError(f"--recall_at={','.join(given)} must be integers, such as 1,2,4") from None


def _score_exported(file: str, recall_at: list[int]) -> dict[str, float]:
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
    return retrieval.evaluate(
        queries.embeddings,
        queries.labels,
        recall_at=recall_at,
        gallery=gallery,
        nmi=bool(_NMI.value),
    )


def _choose_metrics(config: ConfigDict, recall_at: list[int] | None) -> None:
    config.evaluation.recall_at = tuple(recall_at or config.evaluation.recall_at)
    config.evaluation.nmi = config.evaluation.nmi if _NMI.value is None else _NMI.value


def _score_backbone(config: ConfigDict, recall_at: list[int] | None) -> dict[str, Any]:
    _choose_metrics(config, recall_at)
    config.model.backbone = _BACKBONE.value or config.model.backbone
    config.model.pretrained = _PRETRAINED.value or config.model.pretrained
    scores = leaderboard.score_one(leaderboard.without_training(config))
    return {kind: scores[kind] for kind in (leaderboard.FEATURES, leaderboard.WHITENED)}


def _write_leaderboard(config: ConfigDict, recall_at: list[int] | None, folder: Path) -> None:
    # The page needs packages of an extra; without them nothing should be computed.
    from dml_jax.report import leaderboard as page

    if storage.is_url(_OUT.value):
        raise UserError(f"--out={_OUT.value} must be a local folder")
    entries = [_entry(one) for one in _BACKBONES.value]
    _choose_metrics(config, recall_at)
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


def _score_run(folder: Path, recall_at: list[int] | None) -> dict[str, float]:
    config = run_directory.read_config(folder)
    _choose_metrics(config, recall_at)
    built = builder.build(
        parse(config), sharding.make_mesh(), run_directory.read_inspection(folder)
    )
    _, variables = checkpoint.read_network(built.network, folder, _CHECKPOINT.value or "last")
    return built.evaluator.score(built.evaluator.embed(variables, "test"))


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main, embeds=True)
