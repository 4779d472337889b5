"""Computes the retrieval metrics of a run's checkpoint, of exported embeddings or of a backbone.

dml-jax evaluate --workdir=runs/memvir --checkpoint=best_map
dml-jax evaluate --embeddings=runs/memvir/embeddings.npz --nmi --recall_at=1,10,100
dml-jax evaluate --config=cars196 --backbone=resnet50 --pretrained=hf:timm/resnet50.tv_in1k

The last form trains nothing: it scores the pooled features of the backbone on the test images of
the config, and the same features after PCA-whitening fitted on its training images.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dml_jax import retrieval
from dml_jax._utils import sharding
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line
from dml_jax.evaluation import embedding_files, zero_shot
from dml_jax.models.embedder import HEAD
from dml_jax.training import bucket, builder, checkpoint, run_directory
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables

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
        elif one and _CONFIG.value and not _given(_CHECKPOINT, _GALLERY):
            scores = _score_backbone(_CONFIG.value, recall_at)
        else:
            raise UserError(
                "give one of --workdir, optionally with --checkpoint; --embeddings, optionally "
                "with --gallery; and --config, optionally with --backbone and --pretrained"
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


def _score_backbone(config: ConfigDict, recall_at: list[int] | None) -> dict[str, dict[str, float]]:
    _choose_metrics(config, recall_at)
    config.model.backbone = _BACKBONE.value or config.model.backbone
    config.model.pretrained = _PRETRAINED.value or config.model.pretrained
    # Nothing is trained, so no cache of features or of images in device memory is needed.
    config.model.train_from, config.data.cache = HEAD, "none"
    settings = parse(config)
    built = builder.build(settings, sharding.make_mesh())
    variables = network_variables(built.init())
    features = zero_shot.pooled_features(built.evaluator, variables, "test")
    training = zero_shot.pooled_features(built.evaluator, variables, "train")["train"]
    whitened = zero_shot.whiten(features, training, settings.model.dim)
    return {
        "features": built.evaluator.score(features),
        "whitened": built.evaluator.score(whitened),
    }


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
